"""The ways of teaching a recipient a text that are compared: donors, adapters, fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..donor import Donor
from ..model.memory import transplant
from ..partial import running_only, stack_of
from ..training import Part

__all__ = ["METHODS", "Method", "Prepared", "Setting", "donor_of", "in_place"]

_DONOR = "donor"
View = Callable[[], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        load: Returns a fresh recipient.
        shared: A recipient that nobody changes, for methods that leave it frozen.
        layers: k, the donor's and the number of last layers that the cheap rivals train.
        rank: Of LoRA.
        seed: Of what is drawn.
    """

    load: Callable[[], Any]
    shared: Any
    layers: int = 3
    rank: int = 16
    seed: int = 0

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
        model: What is trained: all that requires a gradient.
        views: How it is measured afterwards, by name; "" is how it is meant to be used.
        save: Writes what the method ships.
        part: The layers that run in training.
        inner: The model inside a wrapper.
        removed: Gives the recipient back inside a `with` block; `None` where there is no way back.
    """

    model: Any
    views: Mapping[str, View]
    save: Callable[[Path], Any]
    part: Part | None = None
    inner: Any = None
    removed: View | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of teaching.

    Args:
        name: Its name.
        what: One phrase for the table.
        prepare: Makes a model ready.
        learning_rates: Those that are tried.
        needs: The library that it needs beside those of a plain installation.
    """

    name: str
    what: str
    prepare: Callable[[Setting], Prepared]
    learning_rates: tuple[float, ...]
    needs: str | None = None


def _grown(setting: Setting, position: int, mode: str = "insert", init: str = "identity") -> Any:
    """A transplant with an untrained donor that alone requires gradients."""
    layers = setting.last if mode == "replace" else _before(setting, position)
    start = Donor.from_model(setting.shared, layers, name=_DONOR, init=init)
    model = transplant(setting.shared, start, position=position, mode=mode, name=_DONOR)
    model.requires_grad_(False)
    for number in model.layer_map.layers_of(_DONOR):
        stack_of(model)[number].requires_grad_(True)
    return model


def _before(setting: Setting, position: int) -> list[int]:
    first = min(max(position - setting.layers, 0), setting.count - setting.layers)
    return list(range(first, first + setting.layers))


def in_place(setting: Setting, position: int, mode: str = "insert") -> Prepared:
    """Prepare a donor that is trained inside the frozen recipient.

    Args:
        setting: What methods share.
        position: Where it goes.
        mode: "insert", starting as identity, or "replace", starting as the last k layers.
    """
    model = _grown(setting, position, mode, "copy" if mode == "replace" else "identity")
    own = model.layer_map.layers_of(_DONOR)
    return Prepared(
        model,
        {"": lambda: nullcontext(model)},
        lambda folder: donor_of(model).save_pretrained(folder, position=position, recipient="recipient"),
        part=Part(range(own[0], len(model.layer_map)), donor=own),
        removed=_off(model),
    )


def _off(model: Any) -> View:
    @contextmanager
    def removed() -> Iterator[Any]:
        with model.disable_transplants():
            yield model

    return removed


def donor_of(model: Any) -> Donor:
    """Take the donor out of a model that `in_place` prepared."""
    return Donor.from_model(model, model.layer_map.layers_of(_DONOR), name=_DONOR)


def _standalone(setting: Setting) -> Prepared:
    position = setting.count - 1
    model = _grown(setting, position, init="copy")
    own = model.layer_map.layers_of(_DONOR)

    def at(place: int) -> View:
        return lambda: nullcontext(model if place == position else _moved(setting, model, place))

    @contextmanager
    def alone() -> Iterator[Any]:
        with running_only(model, own, from_embeddings=True):
            yield model

    return Prepared(
        model,
        {"inserted at 1": at(1), f"inserted at {position}": at(position), "alone, not inserted": alone},
        lambda folder: donor_of(model).save_pretrained(folder, position=1, recipient="recipient"),
        part=Part(own, from_embeddings=True, donor=own),
        removed=_off(model),
    )


def _moved(setting: Setting, model: Any, position: int) -> Any:
    return transplant(setting.shared, donor_of(model), position=position, name=_DONOR).eval()


def _full(setting: Setting) -> Prepared:
    model = setting.load()
    model.requires_grad_(True)
    return Prepared(model, {"": lambda: nullcontext(model)}, model.save_pretrained)


def _lora(setting: Setting, layers: Sequence[int] | None = None) -> Prepared:
    from peft import LoraConfig, get_peft_model

    inner = setting.load()
    names: Any = "all-linear" if layers is None else _linear_names(inner, layers)
    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
    )
    model = get_peft_model(inner, config)
    _draw(model, torch.Generator().manual_seed(setting.seed))

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
def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw a new adapter again, as PEFT does, from a generator of its own: PEFT draws from the one that all share."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))


def _linear_names(model: Any, layers: Sequence[int]) -> list[str]:
    stack = stack_of(model)
    chosen = {module for number in layers for module in stack[number].modules()}
    return [
        name for name, module in model.named_modules() if module in chosen and isinstance(module, nn.Linear | Conv1D)
    ]


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
