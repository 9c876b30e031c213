"""The layers of a donor run only on the rows of a batch that use the donor.

Rows that do not use it pass through a layer as they are, and its cache does not hold them. A donor that no row uses
does not run. This only saves work: the hooks of `strength` leave out what was not chosen. So wherever a layer's
arguments, its output or its cache are of another kind than those known here, the layer runs on all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, DynamicLayer
from transformers.utils.output_capturing import _active_collector

from ..errors import ConfigurationError
from .cache_guard import cache_kind
from .calls import arguments_by_name
from .choice import Rows
from .using import CallChoices

_ROWS = "_transplant_rows"
_NATIVE = "_transplant_native"  # of a class that runs by row: the class that it was made of
# Arguments of layers with the batch in their first dimension, or 1 for all rows, and how many dimensions they have.
_BATCH_FIRST = {"hidden_states": (3,), "attention_mask": (2, 4), "position_ids": (2,), "position_embeddings": (3,)}
_SAME_FOR_ALL_ROWS = ("cache_position",)


def _run(
    layer: nn.Module, native: Callable[..., Any], name: str, choices: CallChoices, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Run a layer on the rows that use its donor."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or layer.training or _records(kwargs):
        return native(layer, *args, **kwargs)
    hidden, form = args[0] if args else kwargs["hidden_states"], choices.form
    choice = choices.of_layer(hidden)
    rows = choice.rows(name, hidden) if choice is not None else None
    if rows is None or not form.known:
        output = native(layer, *args, **kwargs)
        form.learn(output)
        return output
    given = arguments_by_name(layer, args, kwargs)
    if any(is_another_stream(value, hidden) for value in given.values()):
        return native(layer, *args, **kwargs)
    narrowed = _of_rows(layer, given, rows) if len(rows.numbers) else given
    if narrowed is None or not _narrow_cache(layer, given, rows, hidden):
        return native(layer, *args, **kwargs)
    if not len(rows.numbers):
        return form.wrap(hidden)
    output = native(layer, **narrowed)
    left = output if isinstance(output, torch.Tensor) else output[0]
    return form.wrap(hidden.to(left.dtype).index_copy(0, rows.numbers, left))


def _records(kwargs: Mapping[str, Any]) -> bool:
    """Whether the call records what happens inside layers, so that a row or layer that is left out would be missing."""
    recorded = {name for name in _active_collector.get() or () if not name.startswith("_")}
    recorded |= {name.removeprefix("output_") for name, value in kwargs.items() if name.startswith("output_") and value}
    return not recorded <= {"hidden_states"}  # these have a place for layers that do not run


def _of_rows(layer: nn.Module, given: Mapping[str, Any], rows: Rows) -> dict[str, Any] | None:
    """The arguments of some rows; `None` if there is one that may not be known to be by row."""
    # Hooks that change what enters a part of the layer may count its rows, as PEFT's for one adapter by row.
    if any(part._forward_pre_hooks for part in layer.modules() if part is not layer):
        return None
    try:
        return {name: _argument_of_rows(name, value, rows) for name, value in given.items()}
    except _UnknownArgument:
        return None


class _UnknownArgument(Exception):  # noqa: N818 - never leaves this module
    pass


def _argument_of_rows(name: str, value: Any, rows: Rows) -> Any:
    if value is None or name in _SAME_FOR_ALL_ROWS or isinstance(value, bool | int | float | str | Cache):
        return value
    if name == "position_embeddings" and isinstance(value, tuple | list):
        return type(value)(_argument_of_rows(name, part, rows) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() in _BATCH_FIRST.get(name, ()):
        if value.shape[0] == 1:
            return value
        if value.shape[0] == len(rows.held):
            return value.index_select(0, rows.numbers.to(value.device))
    raise _UnknownArgument(name)


def is_another_stream(value: Any, hidden: torch.Tensor) -> bool:
    """Whether an argument or output of a layer is a second hidden state, as in the generation of xlnet."""
    alike = isinstance(value, torch.Tensor) and value.dim() == hidden.dim() and value.shape[-1] == hidden.shape[-1]
    return alike and value is not hidden and value.is_floating_point()


def _narrow_cache(layer: nn.Module, given: Mapping[str, Any], rows: Rows, hidden: torch.Tensor) -> bool:
    """Let the cache of a call hold only these rows for a layer; returns whether it can."""
    caches = [value for value in given.values() if isinstance(value, Cache)]
    if not caches:
        return True
    # longcat_flash has two attentions in a layer, each with its own part of the cache.
    found = (getattr(part, "layer_idx", None) for part in layer.modules())
    numbers = {number for number in found if isinstance(number, int)}
    held = hold_rows(caches[0], numbers.pop(), rows.held) if len(numbers) == len(caches) == 1 else None
    if held is not None and not len(rows.numbers):
        held.pass_tokens(hidden)
    return held is not None


def run_by_row(layer: Any, name: str, choices: CallChoices) -> None:
    """Let a layer of a donor of that name run only on the rows that use it."""
    kind: Any = type(layer)
    if not hasattr(kind, _NATIVE):
        layer.__class__ = _by_row(kind)
    setattr(layer, _ROWS, (name, choices))


def run_on_all_rows(layer: Any) -> None:
    """Undo `run_by_row`. A class that others made of the layer's stays, as a parametrization's, and runs all rows."""
    if hasattr(layer, _ROWS):
        delattr(layer, _ROWS)
        layer.__class__ = vars(type(layer)).get(_NATIVE, type(layer))


@functools.cache
def _by_row(kind: Any) -> Any:
    """A subclass of a layer class: an attribute `forward` of the layer would belong to its copies and replicas too."""
    native = kind.forward

    @functools.wraps(native)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        donor = getattr(self, _ROWS, None)
        return _run(self, native, donor[0], donor[1], args, kwargs) if donor else native(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _new, (kind,), *kind.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, _NATIVE: kind}
    return type(kind.__name__, (kind,), {**names, "forward": forward, "__reduce_ex__": reduce})


def _new(kind: Any) -> Any:
    made = _by_row(kind)
    return made.__new__(made)


# -- The cache ---------------------------------------------------------------------------------------------------------


class _HeldRows:
    """What a cache layer of some rows does in its own way; it counts tokens also if it holds no row."""

    # Which rows of the batch it holds, [batch] on the CPU.
    held: torch.Tensor
    keys: Any
    values: Any
    is_initialized: bool
    is_sliding: bool

    def narrow(self, held: torch.Tensor) -> None:
        """Hold no other rows than these."""
        if held is self.held:
            return
        if self._filled and (len(held) != len(self.held) or bool((held & ~self.held).any())):
            raise ConfigurationError(
                f"this cache has keys and values of rows {_rows_in(self.held)} of {len(self.held)} for a donor, and "
                f"this call runs the donor on rows {_rows_in(held)} of {len(held)}. Create a new cache."
            )
        if self._filled and not torch.equal(held, self.held):
            self._keep(held[self.held].nonzero()[:, 0])
        self.held = held

    def pass_tokens(self, hidden: torch.Tensor) -> None:
        """Count the tokens of a hidden state `[batch, tokens, hidden]` of which no row is held."""
        heads, size = (self.keys.shape[1], self.keys.shape[-1]) if self._filled else (1, 1)
        empty = hidden.new_empty(0, heads, hidden.shape[1], size)
        self.update(empty, empty)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._filled and key_states.shape[0] != int(self.held.sum()):
            self.held = torch.ones(key_states.shape[0], dtype=torch.bool)  # it was emptied, and all rows run now
        if key_states.shape[0] != int(self.held.sum()):
            raise ConfigurationError(
                f"this cache has keys and values of rows {_rows_in(self.held)} of {len(self.held)} for a donor, and "
                f"this call runs the donor on {key_states.shape[0]} rows: it is compiled, in training mode, or records "
                "what layers do, so that donors run on all rows. Make all calls with one cache in the same way."
            )
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self) -> int:
        """The number of tokens; the inherited method counts those that left a window, and returns 0 without rows."""
        if self.is_sliding:
            return int(super().get_seq_length())  # type: ignore[misc]
        return int(self.keys.shape[-2]) if self._filled else 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.held)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = torch.arange(len(self.held))[indices.cpu()]  # a mask, or numbers
        held = self.held[indices]
        if self._filled:
            self._keep((self.held.cumsum(0) - 1)[indices[held]])
        self.held = held

    @property
    def _filled(self) -> bool:
        return self.is_initialized and self.keys.dim() > 2

    def _keep(self, indices: torch.Tensor) -> None:
        """Keep some of the held rows, by their number among these."""
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)


@functools.cache
def _held_kind(kind: Any) -> Any:
    """A subclass of a cache layer that holds some rows; `None` for one that holds more than keys and values."""
    in_window = kind.is_sliding and kind.__bases__ == (DynamicLayer,)
    return type(kind.__name__, (_HeldRows, kind), {}) if kind is DynamicLayer or in_window else None


def hold_rows(cache: Cache, number: int, held: torch.Tensor) -> _HeldRows | None:
    """Let one layer of a cache hold only some rows, `[batch]` on the CPU; `None` where it can only hold all."""
    if cache_kind(cache) is not DynamicCache or cache.offloading:
        return None
    # As the cache does it itself, when the layer runs.
    while len(cache.layers) <= number and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    kind = _held_kind(type(layer)) if isinstance(layer, DynamicLayer) else None
    if kind is not None and (not layer.is_initialized or layer.keys.shape[0] in (0, len(held))):
        made = kind.__new__(kind)
        vars(made).update(vars(layer), held=torch.ones_like(held))
        cache.layers[number] = layer = made
    if not isinstance(layer, _HeldRows):
        return None
    layer.narrow(held)
    return layer


def _rows_in(held: torch.Tensor) -> list[int]:
    return held.nonzero()[:, 0].tolist()
