"""Refuse a cache that was filled while other donors ran, or the same ones differently."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

from ..errors import ConfigurationError
from .calls import Calls
from .requests import Requests

__all__ = ["CacheGuard", "Here", "Side"]

_GUARDED_METHODS = ("update", "get_mask_sizes", "update_conv_state", "update_recurrent_state")
_MARK = "_transplant_side"


class Side(NamedTuple):
    """What a cache was filled with.

    Args:
        plan: Counts the changes of which layers the model holds.
        disabled: The donors that were switched off.
        settings: Strengths and composition, as they were set.
        request: What the call asked for with `using`; `None` for nothing.
    """

    plan: int
    disabled: frozenset[str]
    settings: Hashable
    request: Hashable


@dataclasses.dataclass
class Here:
    """On what side the calls of a model run now.

    Args:
        requests: What calls ask for.
        settings: Strengths and composition, as they are set.
        plan: Counts the changes of which layers the model holds.
        disabled: The donors that are switched off.
        inserted: The donors that the model holds beside the recipient's layers.
        replacing: Those that it holds instead of some.
    """

    requests: Requests
    settings: Hashable = None
    plan: int = 0
    disabled: frozenset[str] = frozenset()
    inserted: frozenset[str] = frozenset()
    replacing: frozenset[str] = frozenset()

    @property
    def set(self) -> tuple[int, frozenset[str], Hashable]:
        """What holds for every call."""
        return self.plan, self.disabled, self.settings

    @property
    def side(self) -> Side:
        """What a cache would be filled with."""
        wanted = self.requests.now()
        return Side(*self.set, wanted and wanted.key)

    def check_request(self) -> None:
        """Refuse a call whose block began with other donors, where it cannot have what it names.

        Raises:
            ConfigurationError: Naming the donors.
        """
        wanted = self.requests.now()
        if wanted is None:
            return
        gone = wanted.named - (self.inserted - self.disabled)
        changed = gone | (wanted.replacing ^ (self.replacing - self.disabled))
        if changed:
            raise ConfigurationError(
                f"donors {', '.join(map(repr, sorted(changed)))} were removed, switched off, or put in place of "
                "recipient layers after the using(...) block of this call began. Begin another block, with the donors "
                "that the model has now."
            )


class CacheGuard:
    """Stands at a model's decoder: counts its calls, settles what each wants, and refuses caches of another side.

    Caches are watched once the model runs otherwise than it was loaded, or may in some calls. A cache that is filled
    meanwhile gets a subclass of its own type, which refuses use on any other side.

    Args:
        decoder: The module that owns the layers.
        here: Where calls run now.
    """

    def __init__(self, decoder: nn.Module, here: Here) -> None:
        self.here = here
        self.calls = Calls()
        # Watch caches also where the model runs as it was loaded.
        self.always = False
        # Caches without a mark were filled on this side.
        self.unmarked = here.side
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @staticmethod
    def of(decoder: nn.Module) -> CacheGuard | None:
        """Find the guard that stands at a decoder; it stays when a model's donors are removed."""
        owners = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
        return next((owner for owner in owners if isinstance(owner, CacheGuard)), None)

    def leave(self) -> None:
        """Stand there no longer."""
        for hook in self._hooks:
            hook.remove()

    @property
    def _watches(self) -> bool:
        return self.always or self.here.side != self.unmarked

    def check(self, made_on: Side) -> None:
        """Refuse a cache of another side.

        Raises:
            ConfigurationError: Saying what differs.
        """
        now = self.here.side
        if made_on == now:
            return
        if made_on.plan == now.plan and made_on.disabled != now.disabled:
            raise ConfigurationError(
                f"this cache was filled with {_off(made_on.disabled)}, and the model now runs with "
                f"{_off(now.disabled)}: its layers are not the layers that run. Start with a new cache on each side of "
                "disable_transplants()."
            )
        changed = "donors were added, removed or moved"
        if made_on.plan == now.plan:
            changed = "other strengths were set" if made_on.settings != now.settings else "this call uses other donors"
        raise ConfigurationError(
            f"this cache was filled before {changed}: it holds what other hidden states became. Start with a new cache."
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.calls.begin_pass()
        self.here.requests.begin_call(self.here.set)
        self.here.check_request()
        if not self._watches:
            return
        for cache in _caches(args, kwargs):
            mark = getattr(cache, _MARK, None)
            if mark is not None:
                self.check(mark.side)
            elif _filled(cache):
                self.check(self.unmarked)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            # After an exception there is no output: a cache that was just refused is of its own side still.
            for cache in _caches(args, kwargs, output) if output is not None and self._watches else ():
                if getattr(cache, _MARK, None) is None:
                    setattr(cache, _MARK, _Mark(self, self.here.side))
                    kind: Any = type(cache)
                    cache.__class__ = _guarded(kind)
        finally:
            began = self.here.requests.end_call()
            self.calls.end_pass()
        if output is not None and began is not None and began != self.here.set:
            raise ConfigurationError(
                "donors were switched or changed within this call, by a hook: some of its layers ran before and some "
                "after. Let a hook switch back before it returns, or switch between calls."
            )


class _Mark:
    """What a cache remembers; a copied cache belongs to the same model."""

    def __init__(self, guard: CacheGuard, side: Side) -> None:
        self.guard, self.side = guard, side

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return self


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
            mark = getattr(self, _MARK)
            mark.guard.check(mark.side)
            return original(self, *args, **kwargs)

        return method

    methods = {name: checked(name) for name in _GUARDED_METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})
