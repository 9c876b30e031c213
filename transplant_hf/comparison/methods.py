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
from ..model.in_memory import transplant
from ..partial import running_only, stack_of
from ..training import Part

__all__ = ["METHODS", "Method", "Prepared", "Setting", "donor_of", "in_place"]

_DONOR = "donor"
View = Callable[[], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        load: Returns a new copy of the recipient.
        shared: A recipient for methods that leave it frozen.
        layers: k, the donor's number of layers, and the number of last layers that the cheaper rivals train.
        rank: The rank of LoRA.
        seed: The seed of new weights.
    """

    load: Callable[[], Any]
    shared: Any
    layers: int = 3
    rank: int = 16
    seed: int = 42

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
    """A model ready to be trained by one method.

    Args:
        model: The model; parameters that require a gradient are trained.
        views: The models that are measured afterwards, by name; "" is the usual one.
        save: Writes the method's artifact.
        part: The layers that run in training.
        inner: The model inside a wrapper.
        removed: The recipient again inside a `with` block; `None` where the change cannot be removed.
    """

    model: Any
    views: Mapping[str, View]
    save: Callable[[Path], Any]
    part: Part | None = None
    inner: Any = None
    removed: View | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Args:
        name: Its name.
        what: Its name in the table.
        prepare: Returns a model that is ready to be trained.
        learning_rates: The learning rates that are tried.
        needs: A library that it needs and that may be missing.
    """

    name: str
    what: str
    prepare: Callable[[Setting], Prepared]
    learning_rates: tuple[float, ...]
    needs: str | None = None


def _untrained(setting: Setting, position: int, mode: str = "insert", init: str = "identity") -> Any:
    """A transplant with an untrained donor whose parameters alone require gradients."""
    first = setting.last[0] if mode == "replace" else min(max(position - setting.layers, 0), setting.last[0])
    layers = list(range(first, first + setting.layers))
    start = Donor.from_model(setting.shared, layers, name=_DONOR, init=init)
    model = transplant(setting.shared, start, position=position, mode=mode, name=_DONOR)
    model.requires_grad_(False)
    for number in model.layer_map.layers_of(_DONOR):
        stack_of(model)[number].requires_grad_(True)
    return model


def in_place(setting: Setting, position: int, mode: str = "insert") -> Prepared:
    """Prepare a donor that is trained inside the frozen recipient."""
    model = _untrained(setting, position, mode, "copy" if mode == "replace" else "identity")
    own = model.layer_map.layers_of(_DONOR)
    return Prepared(
        model,
        {"": lambda: nullcontext(model)},
        lambda folder: donor_of(model).save_pretrained(folder, position=position, recipient="recipient"),
        part=Part(range(own[0], len(model.layer_map)), donor=own),
        removed=_without_donor(model),
    )


def _without_donor(model: Any) -> View:
    @contextmanager
    def removed() -> Iterator[Any]:
        with model.disable_transplants():
            yield model

    return removed


def donor_of(model: Any) -> Donor:
    """Return the donor of a model that `in_place` prepared."""
    return Donor.from_model(model, model.layer_map.layers_of(_DONOR), name=_DONOR)


def _standalone(setting: Setting) -> Prepared:
    position = setting.count - 1
    model = _untrained(setting, position, init="copy")
    own = model.layer_map.layers_of(_DONOR)

    def first() -> AbstractContextManager[Any]:
        return nullcontext(transplant(setting.shared, donor_of(model), position=1, name=_DONOR).eval())

    @contextmanager
    def alone() -> Iterator[Any]:
        with running_only(model, own, from_embeddings=True):
            yield model

    return Prepared(
        model,
        {
            "inserted at 1": first,
            f"inserted at {position}": lambda: nullcontext(model),
            "alone, not inserted": alone,
        },
        lambda folder: donor_of(model).save_pretrained(folder, position=1, recipient="recipient"),
        part=Part(own, from_embeddings=True, donor=own),
        removed=_without_donor(model),
    )


def _full(setting: Setting) -> Prepared:
    model = setting.load()
    model.requires_grad_(True)
    return Prepared(model, {"": lambda: nullcontext(model)}, model.save_pretrained)


def _lora(setting: Setting, layers: Sequence[int] | None = None) -> Prepared:
    from peft import LoraConfig, get_peft_model

    inner = setting.load()
    excluded = [str(number) for number in range(setting.count) if layers is not None and number not in layers]
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=rf"{re.escape(find_stack(inner))}\.({'|'.join(excluded)})\..*" if excluded else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(inner, config)
    _initialize_adapters(model, torch.Generator().manual_seed(setting.seed))

    @contextmanager
    def removed() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    return Prepared(
        model,
        {"": lambda: nullcontext(model)},
        lambda folder: model.save_pretrained(str(folder)),
        part=None if layers is None else Part(range(layers[0], setting.count)),
        inner=inner,
        removed=removed,
    )


@torch.no_grad()
def _initialize_adapters(model: nn.Module, generator: torch.Generator) -> None:
    """Initialize an adapter as PEFT does, but with a generator of its own instead of the global one."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("donor", "donor, in place, at L-1", lambda s: in_place(s, s.count - 1), (3e-3, 1e-2, 2e-2)),
        Method("donor-end", "donor, in place, at L", lambda s: in_place(s, s.count), (3e-3, 1e-2, 2e-2)),
        Method("standalone", "donor, standalone (the paper's)", _standalone, (1e-3, 3e-3, 1e-2)),
        Method("lora", "LoRA, all linear layers", _lora, (3e-3, 1e-2, 2e-2), "peft"),
        Method("lora-last", "LoRA, last k layers, cached", lambda s: _lora(s, s.last), (3e-3, 1e-2, 2e-2), "peft"),
        Method(
            "last", "last k layers fine-tuned, cached", lambda s: in_place(s, s.last[0], "replace"), (1e-3, 3e-3, 1e-2)
        ),
        Method("full", "full fine-tuning", _full, (3e-4, 1e-3, 3e-3)),
    )
}
