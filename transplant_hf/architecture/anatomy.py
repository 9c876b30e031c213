"""The structure of a model: where its decoder layers are, what each consists of, and how two layers differ.

A fingerprint holds, for every module inside a layer, its class, its plain attributes and the shapes of its tensors.
It does not include the values of buffers, or how `forward` uses the layer's number; `exceptions.py` lists the cases
where that matters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BUILD_ERRORS, CompatibilityError
from ..numeric import is_whole
from .build import build_on_meta
from .stack import decoder_stack, find_stack

Fingerprint = dict[str, Any]

_LAYER_NUMBER = re.compile(r"(layer|block|decoder|depth)_?(idx|id|index|number|num|i)$|^(idx|index|layer|i)$", re.I)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
# `config` is the model's and follows the layers by itself; the rest is the state of a running model.
_NOT_STRUCTURE = _MODULE_INTERNALS | {
    "config",
    "gradient_checkpointing",
    "name_or_path",
    "warnings_issued",
    "all_tied_weights_keys",
}


def fingerprint(layer: nn.Module) -> Fingerprint:
    """Describe a layer."""
    found: Fingerprint = {}
    for path, module in layer.named_modules():
        dot = f"{path}." if path else ""
        found[f"{path or 'layer'} (class)"] = type(module).__qualname__
        found.update({f"{dot}{name}": plain(value) for name, value in structural_attributes(module).items()})
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found[f"{dot}{name} (shape)"] = None if tensor is None else list(tensor.shape)
    return found


def structural_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes without those of torch and the state of a running model; compare by `plain`."""
    attributes = {name: value for name, value in vars(module).items() if name not in _NOT_STRUCTURE}
    return {name: value for name, value in attributes.items() if not isinstance(value, PreTrainedConfig | nn.Module)}


def plain(value: Any) -> Any:
    """Make an attribute comparable: functions by name, tensors by shape."""
    if value is None or isinstance(value, bool | int | float | str | complex):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return str(value)
    if isinstance(value, functools.partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return getattr(value, "__qualname__", repr(value))
    return type(value).__qualname__


def is_layer_number(name: str, value: Any, index: int) -> bool:
    """Whether an attribute holds the number of the layer at `index`."""
    last = name.rpartition(".")[2]
    return is_whole(value) and value == index and bool(_LAYER_NUMBER.search(last))


@dataclasses.dataclass(frozen=True)
class Standing:
    """A layer's fingerprint, its number, and how many layers its model has."""

    fingerprint: Fingerprint
    number: int
    num_layers: int


Places = Mapping[int, Collection[int]]


def differences(was: Standing, became: Standing, places: Places) -> list[str]:
    """List how a layer differs from what it was, except for its number."""
    lines = []
    for name in dict.fromkeys([*was.fingerprint, *became.fingerprint]):
        old, new = was.fingerprint.get(name, "absent"), became.fingerprint.get(name, "absent")
        both_nan = old != old and new != new
        # The model's own list, which follows the layers, has an entry for each.
        lists = isinstance(old, list) and isinstance(new, list)
        own_lists = lists and (len(old), len(new)) == (was.num_layers, became.num_layers)
        same = old == new or both_nan or own_lists or _numbers_moved(old, new, places)
        if not same and not _renumbered(name, old, new, was, became):
            lines.append(f"{name}: {old} became {new}")
    return lines


def _numbers_moved(old: Any, new: Any, places: Places) -> bool:
    """Whether both list the same layers, or key something by them, under the numbers they have in each model."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = ([int(key) if key.isdigit() else key for key in keyed] for keyed in (old, new))
        return list(old.values()) == list(new.values()) and _numbers_moved(before, after, places)
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        return False
    return all(isinstance(n, int) and now in places.get(n, ()) for n, now in zip(old, new, strict=True))


def _renumbered(name: str, old: Any, new: Any, was: Standing, became: Standing) -> bool:
    # A layer with two attentions numbers them 2n and 2n + 1: each has a cache of its own.
    return any(
        is_layer_number(name, old, times * was.number + more)
        and is_layer_number(name, new, times * became.number + more)
        for times, more in ((1, 0), (2, 0), (2, 1))
    )


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The structure of a model, built on the meta device."""

    model_class: Any
    config: PreTrainedConfig
    what: str = "model"  # "recipient X" or "donor Y" in messages

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device."""
        try:
            return build_on_meta(self.model_class, self.config)
        except BUILD_ERRORS as error:
            raise CompatibilityError(
                f"{self.what}: {self.model_class.__name__} cannot be built from its configuration "
                f"({self.config.model_type}): {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def stack_path(self) -> str:
        """Path of the list of decoder layers, such as `"model.layers"`."""
        return find_stack(self.model, self.what)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, on the meta device."""
        return decoder_stack(self.model, self.stack_path)

    @cached_property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @cached_property
    def sharing_layers(self) -> set[int]:
        """The layers that share weights with each other."""
        tied = self.model.all_tied_weights_keys
        names = [name for name in (*tied, *tied.values()) if name.startswith(f"{self.stack_path}.")]
        return {int(name.removeprefix(f"{self.stack_path}.").partition(".")[0]) for name in names}

    @cached_property
    def fingerprints(self) -> list[Fingerprint]:
        """The fingerprint of each layer."""
        return [fingerprint(layer) for layer in self.layers]

    def kind(self, index: int) -> Any:
        """A value that is equal for two layers of one kind."""
        return {name: value for name, value in self.fingerprints[index].items() if value != index}


@dataclasses.dataclass(frozen=True)
class LayerOrigin:
    """The source model of one running layer, and the layer's number there."""

    anatomy: Anatomy
    index: int
