"""The methods that are compared: donors, adapters and fine-tuning."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architecture import find_stack
from ..donor import Donor
from ..layer_map import Position, spread_positions
from ..model.in_memory import transplant
from ..partial import PartialRun, stack_of
from ..training import Part
from ..training.arguments import LEARNING_RATES, REPLACED_STEP, root_mean_square, width_scaled
from ..training.donor_trainer import with_untrained_donor

__all__ = ["METHODS", "Method", "Prepared", "Setting", "donor_of", "in_place", "on_grid"]

_DONOR = "donor"
View = Callable[[], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods share."""

    load: Callable[[], Any]  # returns a new copy of the recipient
    shared: Any  # a recipient for methods that leave it frozen
    layers: int = 3  # k, of the donor, and of the last layers that the cheaper rivals train
    rank: int = 16  # of LoRA
    seed: int = 42  # of new weights

    @property
    def count(self) -> int:
        """The recipient's L."""
        return len(stack_of(self.shared))

    @property
    def last(self) -> list[int]:
        """The recipient's last k layers."""
        return list(range(self.count - self.layers, self.count))


@dataclasses.dataclass
class Prepared:
    """A model ready to be trained by one method: all parameters that require a gradient."""

    model: Any
    save: Callable[[Path], Any]  # writes the method's artifact
    views: Mapping[str, View] = dataclasses.field(default_factory=dict)  # what is measured afterwards, by name
    part: Part | None = None  # the layers that run in training
    inner: Any = None  # the model inside a wrapper
    removable: bool = False  # whether the recipient can be had again
    # The model with a share of what it learned inside a `with` block; `None` where that has no meaning.
    at_strength: Callable[[float], AbstractContextManager[Any]] | None = None

    def __post_init__(self) -> None:
        self.views = self.views or {"": lambda: nullcontext(self.model)}  # the usual one


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Args:
        name: Its name.
        what: Its name in the table.
        prepare: Returns a model that is ready to be trained.
        learning_rate: The learning rate that is tried first.
        needs: A library that it needs and that may be missing.
        rate_of: What the rate is for: "any" model; one of "width" 192, and in proportion to 1 / width; "weights" of a
            root mean square of 1, and in proportion to that of the layers.
    """

    name: str
    what: str
    prepare: Callable[[Setting], Prepared]
    learning_rate: float
    needs: str | None = None
    rate_of: str = "width"

    def first_learning_rate(self, recipient: Any) -> float:
        """Return the learning rate that is tried first.

        Args:
            recipient: The untouched recipient.
        """
        if self.rate_of == "width":
            return on_grid(width_scaled(self.learning_rate, recipient.config.get_text_config(decoder=True).hidden_size))
        scale = root_mean_square(stack_of(recipient).parameters()) if self.rate_of == "weights" else 1.0
        return on_grid(self.learning_rate * scale)


def on_grid(rate: float, steps: int = 0) -> float:
    """Return the learning rate of the grid ..., 1e-3, 3e-3, 1e-2, ... that is this many steps from the nearest one."""
    return float(f"{10 ** ((round(2 * math.log10(rate)) + steps) / 2):.0e}")


def in_place(setting: Setting, position: Position, mode: str = "insert") -> Prepared:
    """Prepare a donor that is trained inside the frozen recipient."""
    model, part = with_untrained_donor(setting.shared, position, setting.layers, mode=mode, name=_DONOR)

    @contextmanager
    def at_strength(strength: float) -> Iterator[Any]:
        model.set_strength(_DONOR, strength)
        yield model
        model.set_strength(_DONOR, 1.0)

    return Prepared(
        model,
        lambda folder: donor_of(model).save_pretrained(folder, position=position, recipient="recipient"),
        part=part,
        removable=True,
        at_strength=at_strength if mode == "insert" else _interpolation(model, setting),
    )


def _interpolation(model: nn.Module, setting: Setting) -> Callable[[float], AbstractContextManager[Any]]:
    """Return `at_strength` for a model whose trained weights take the place of the recipient's."""

    @contextmanager
    def at_strength(strength: float) -> Iterator[Any]:
        pairs = zip(model.parameters(), setting.shared.parameters(), strict=True)
        trained = [(own, before, own.detach().clone()) for own, before in pairs if own.requires_grad]
        with torch.no_grad():
            for own, before, _ in trained:
                own.lerp_(before, 1 - strength)
            yield model
            for own, _, learned in trained:
                own.copy_(learned)

    return at_strength


def donor_of(model: Any) -> Donor:
    """Return the donor of a model that `in_place` prepared."""
    return Donor.from_model(model, model.layer_map.layers_of(_DONOR), name=_DONOR)


def _standalone(setting: Setting) -> Prepared:
    position = setting.count - 1
    model, part = with_untrained_donor(setting.shared, position, setting.layers, init="copy", name=_DONOR, alone=True)

    def first() -> AbstractContextManager[Any]:
        return nullcontext(transplant(setting.shared, donor_of(model), position=1, name=_DONOR).eval())

    @contextmanager
    def alone() -> Iterator[Any]:
        with PartialRun(model, part.donor, from_embeddings=True):
            yield model

    return Prepared(
        model,
        lambda folder: donor_of(model).save_pretrained(folder, position=1, recipient="recipient"),
        {"inserted at 1": first, f"inserted at {position}": lambda: nullcontext(model), "alone, not inserted": alone},
        part=part,
        removable=True,
    )


def _full(setting: Setting) -> Prepared:
    model = setting.load()
    model.requires_grad_(True)
    return Prepared(model, model.save_pretrained, at_strength=_interpolation(model, setting))


def _matched_rank(setting: Setting) -> int:
    """The rank at which LoRA trains about as many numbers as a donor."""
    stack = stack_of(setting.shared)
    donor = sum(parameter.numel() for number in setting.last for parameter in stack[number].parameters())
    linear = [module for module in stack.modules() if isinstance(module, nn.Linear)]
    return max(1, round(donor / sum(module.in_features + module.out_features for module in linear)))


def _lora(setting: Setting, layers: Sequence[int] | None = None, rank: int | None = None) -> Prepared:
    from peft import LoraConfig, get_peft_model
    from peft.helpers import rescale_adapter_scale

    inner, rank = setting.load(), rank or setting.rank
    excluded = [str(number) for number in range(setting.count) if layers is not None and number not in layers]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=rf"{re.escape(find_stack(inner))}\.({'|'.join(excluded)})\..*" if excluded else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(inner, config)
    _initialize_adapters(model, torch.Generator().manual_seed(setting.seed))

    @contextmanager
    def at_strength(strength: float) -> Iterator[Any]:
        with rescale_adapter_scale(model, strength):
            yield model

    return Prepared(
        model,
        lambda folder: model.save_pretrained(str(folder)),
        part=None if layers is None else Part(range(layers[0], setting.count)),
        inner=inner,
        removable=True,
        at_strength=at_strength,
    )


@torch.no_grad()
def _initialize_adapters(model: nn.Module, generator: torch.Generator) -> None:
    """Initialize an adapter as PEFT does, but with a generator of its own instead of the global one."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))


_RATE = LEARNING_RATES["in_place"]
_METHODS = (
    Method("donor", "donor at L-1", lambda s: in_place(s, s.count - 1), _RATE),
    Method("donor-end", "donor at L", lambda s: in_place(s, s.count), _RATE),
    Method("donor-spread", "donor, spread evenly", lambda s: in_place(s, spread_positions(s.count, s.layers)), _RATE),
    Method(
        "replace-spread",
        "layers replaced, spread evenly",
        lambda s: in_place(s, spread_positions(s.count, s.layers, "replace"), "replace"),
        REPLACED_STEP,
        rate_of="weights",
    ),
    Method("standalone", "donor, standalone (the paper's)", _standalone, LEARNING_RATES["standalone"]),
    Method("lora", "LoRA, all linear layers", _lora, 3e-3, "peft", "any"),
    Method(
        "lora-matched",
        "LoRA, as many parameters as the donor",
        lambda s: _lora(s, rank=_matched_rank(s)),
        3e-3,
        needs="peft",
        rate_of="any",
    ),
    Method("lora-last", "LoRA, last k layers, cached", lambda s: _lora(s, s.last), 1e-2, "peft", "any"),
    Method(
        "last",
        "last k layers fine-tuned, cached",
        lambda s: in_place(s, s.last[0], "replace"),
        REPLACED_STEP,
        rate_of="weights",
    ),
    Method("full", "full fine-tuning", _full, 1e-3),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
