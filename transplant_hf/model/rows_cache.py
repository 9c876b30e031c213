"""Layers of a dynamic cache that hold the keys and values of some rows of a batch, or of none."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer

from ..errors import ConfigurationError
from .cache_guard import cache_kind


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
                f"this cache has keys and values of rows {_numbers(self.held)} of {len(self.held)} for a donor, and "
                f"this call runs the donor on rows {_numbers(held)} of {len(held)}. Create a new cache."
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
                f"this cache has keys and values of rows {_numbers(self.held)} of {len(self.held)} for a donor, and "
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
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.held)).repeat_interleave(repeats))

    @property
    def _filled(self) -> bool:
        return self.is_initialized and self.keys.dim() > 2

    def _select(self, indices: torch.Tensor) -> None:
        """Make the batch of these rows of the batch, in this order."""
        indices = torch.arange(len(self.held))[indices.cpu()]  # a mask, or numbers
        held = self.held[indices]
        if self._filled:
            self._keep((self.held.cumsum(0) - 1)[indices[held]])
        self.held = held

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
    """Let one layer of a cache hold only some rows of a batch.

    Args:
        cache: The cache.
        number: The layer's number.
        held: Which rows, `[batch]`, on the CPU.

    Returns:
        The layer, or `None` where the cache is of a kind that holds all rows.
    """
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


def _numbers(held: torch.Tensor) -> list[int]:
    return held.nonzero()[:, 0].tolist()
