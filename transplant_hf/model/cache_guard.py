"""Refuse a cache that was filled on the other side of the switch: its layers are not the layers that run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from ..errors import ConfigurationError

__all__ = ["CacheGuard"]

_GUARDED_METHODS = ("update", "get_mask_sizes", "update_conv_state", "update_recurrent_state")
_MARK = "_transplant_side"


class CacheGuard:
    """Watches the caches of one model while donors are switched off; while all are on, nothing is watched.

    A cache that is filled while donors are off gets a subclass of its own type, which refuses use on any other side.
    """

    def __init__(self) -> None:
        self.disabled: frozenset[str] = frozenset()
        self._hooks: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheGuard:
        # A copied cache belongs to the same model; a copied switch makes a guard of its own.
        return self

    def stand(self, decoder: nn.Module, disabled: frozenset[str]) -> None:
        """Watch a decoder while these donors are off.

        Args:
            decoder: The module that owns the layers.
            disabled: The donors that are off.
        """
        self.disabled = disabled
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if disabled:
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True),
            ]

    def check(self, made_with: frozenset[str]) -> None:
        """Refuse a cache of another side.

        Raises:
            ConfigurationError: Saying which donors were off then and are now.
        """
        if made_with != self.disabled:
            raise ConfigurationError(
                f"this cache was filled with {_off(made_with)}, and the model now runs with {_off(self.disabled)}: "
                "its layers are not the layers that run. Start with a new cache on each side of disable_transplants()."
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        for cache in _caches(args, kwargs):
            made_with = getattr(cache, _MARK, None)
            if made_with is not None:
                self.check(made_with[1])
            elif _filled(cache):
                self.check(frozenset())

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for cache in _caches(args, kwargs, output):
            if getattr(cache, _MARK, None) is None:
                setattr(cache, _MARK, (self, self.disabled))
                kind: Any = type(cache)
                cache.__class__ = _guarded(kind)


def _off(disabled: frozenset[str]) -> str:
    return f"donors off: {', '.join(sorted(disabled))}" if disabled else "all donors on"


def _caches(*where: Any) -> list[Cache]:
    found = []
    for place in where:
        values = place.values() if isinstance(place, dict) else place if isinstance(place, tuple) else ()
        found += [value for value in values if isinstance(value, Cache)]
    return found


def _filled(cache: Cache) -> bool:
    parts = [cache, getattr(cache, "self_attention_cache", None)]
    layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    return any(_layer_filled(layer) for layer in layers)


def _layer_filled(layer: Any) -> bool:
    if type(layer).__name__.startswith("Dummy"):  # no cache of its own: initialised from the start
        return False
    states = [getattr(layer, name, {}) for name in ("is_conv_states_initialized", "is_recurrent_states_initialized")]
    linear = [filled for state in states for filled in (state.values() if isinstance(state, dict) else [state])]
    # A static layer may have its memory before it holds anything.
    holds = getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0
    return bool(holds) or any(linear)


@functools.cache
def _guarded(kind: Any) -> Any:
    def checked(name: str) -> Any:
        original = getattr(kind, name)

        @functools.wraps(original)
        def method(self: Cache, *args: Any, **kwargs: Any) -> Any:
            guard, made_with = getattr(self, _MARK)
            guard.check(made_with)
            return original(self, *args, **kwargs)

        return method

    methods = {name: checked(name) for name in _GUARDED_METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})
