"""The structure of a decoder layer, and the differences between two layers.

A fingerprint holds, for every module inside a layer, its class, its plain attributes and the shapes of its tensors.
It does not include the values of buffers, or how `forward` uses the layer's number; `exceptions.py` lists the cases
where that matters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..numeric import is_whole

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
