"""Refuse a cache of keys and values that was filled with other donors or other strengths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ..errors import ConfigurationError
from .calls import Calls, OutputForm, arguments_by_name
from .choice import Choice
from .routing import Prompt, mask_of_prompt, read_probe
from .using import CallChoices

_GUARDED_METHODS = ("update", "get_mask_sizes", "update_conv_state", "update_recurrent_state")
_MARK, _KIND = "_transplant_mark", "_transplant_kind"


class Setting(NamedTuple):
    """What applies to all calls of a model."""

    generation: int = 0  # counts the changes of the layers that the model holds
    disabled: frozenset[str] = frozenset()  # the donors that are switched off
    strengths: Hashable = None  # and the composition
    inserted: frozenset[str] = frozenset()  # the donors that the model holds in addition to the recipient's layers
    replacing: frozenset[str] = frozenset()  # those that it holds in place of recipient layers


# What a cache was filled with: the setting of the model, and the key of the call's choice.
_Origin = tuple[Setting, Hashable]


class _Mark:
    """What a cache remembers. The copy of a cache belongs to the same model."""

    def __init__(self, guard: CacheGuard, origin: _Origin, choice: Choice | None) -> None:
        self.guard, self.origin, self.choice = guard, origin, choice

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return self


class CacheGuard:
    """Hooks on a model's decoder that count its calls, find the choice of each, and refuse caches of another origin.

    Caches are watched once the model runs with another setting than it was loaded with, or calls may choose donors. A
    cache that is filled then gets a subclass of its own type, which checks the origin at each use.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.calls = Calls()
        self.choices = CallChoices(OutputForm())
        # The model around the decoder, which sets it.
        self.model: Callable[[], Any] = NoneType
        self.setting = Setting()
        # Watch caches also while the model runs as it was loaded.
        self._always = False
        # Makes the choice of calls outside `using`, for a model whose donors choose themselves; and what it made.
        self._make_default: Callable[[], Choice] | None = None
        self._default: Choice | None = None
        # The hidden states of a few tokens before the first donor, by generation and place.
        self._probes: dict[Hashable, torch.Tensor | None] = {}
        # The origin of caches without a mark: the first setting.
        self._unmarked: _Origin | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": NoneType}  # a copy belongs to another model

    @staticmethod
    def of(decoder: nn.Module) -> CacheGuard | None:
        """Return the guard of a decoder; it stays when a model's donors are removed."""
        owners = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
        return next((owner for owner in owners if isinstance(owner, CacheGuard)), None)

    def use(self, setting: Setting, always: bool, default: Callable[[], Choice] | None = None) -> None:
        """Change the setting, and what makes the choice of calls outside `using`."""
        self.setting, self._always, self._make_default, self._default = setting, always, default, None
        if self._unmarked is None:
            self._unmarked = (setting, None)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _origin(self) -> _Origin:
        """What a cache is filled with now."""
        choice = self.choices.current()
        return self.setting, choice and choice.key

    def check(self, origin: _Origin) -> None:
        """Refuse a cache of another origin."""
        now, choice = self._origin(), self.choices.current() or self.find_default()
        # Between calls nothing is chosen yet, and the next one takes the choice that the cache was filled with.
        waits = choice is not None and choice.router is not None and not self.choices.thread.calling
        (old, _), new = origin, self.setting
        if origin == now or (waits and old == new):
            return
        if old.generation == new.generation and old.disabled != new.disabled:
            raise ConfigurationError(
                f"this cache was filled with {_off(old.disabled)}, and the model now runs with {_off(new.disabled)}. "
                "Create a new cache inside the disable_transplants() block, and another one after it."
            )
        if old.generation != new.generation:
            change = "before donors were added, removed or moved"
        else:
            change = "before other strengths were set" if old != new else "by a call that uses other donors"
        raise ConfigurationError(f"this cache was filled {change}. Create a new cache.")

    def _check_choice(self, choice: Choice) -> None:
        """Refuse a call whose block began with donors that the model does not have any more."""
        now = self.setting
        gone = choice.chosen - (now.inserted - now.disabled)
        if changed := gone | (choice.replacing ^ (now.replacing - now.disabled)):
            raise ConfigurationError(
                f"donors {', '.join(map(repr, sorted(changed)))} were removed, switched off, or put in place of "
                "recipient layers after the using(...) block of this call began. Begin another block, with the donors "
                "that the model has now."
            )

    def _check_layers(self, cache: Cache) -> None:
        """Refuse an empty cache that was made for other layers: with a window, it would lose what a layer reads."""
        model = self.model()
        if model is None or not isinstance(cache, DynamicCache | StaticCache) or _is_filled(cache):
            return
        found, own = cache.is_sliding, DynamicCache(config=model.config).is_sliding
        if cache.layer_class_to_replicate is None and own and found != own:
            layers = [f"{len(one)} layers, {sum(one)} with a window" for one in (found, own)]
            raise ConfigurationError(
                f"this cache was made for other layers ({layers[0]}) than those that run with "
                f"{_off(self.setting.disabled)} ({layers[1]}), or in another order. Create a new cache where it is "
                "used, with model.config as it is there."
            )

    @property
    def _watching(self) -> bool:
        return self._always or self._origin() != self._unmarked

    def find_default(self) -> Choice | None:
        """The choice of calls outside `using`; `None` where donors do not choose themselves."""
        if self._default is None and self._make_default is not None:
            self._default = self._make_default()
        return self._default

    def _prepare_router(self, choice: Choice, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a call take the choice that a cache was filled with, or make its own within the call."""
        given = arguments_by_name(module, args, kwargs)
        key = (self.setting.generation, choice.router.place)
        if key not in self._probes:
            self._probes[key] = None  # the probe is a call of its own
            try:
                device = next(value.device for value in given.values() if isinstance(value, torch.Tensor))
                self._probes[key] = read_probe(module, choice.router.place, device)
            finally:
                if self._probes[key] is None:
                    del self._probes[key]
        if (probe := self._probes[key]) is not None:
            choice.router.check(probe)
        for cache in _caches(args, kwargs):
            mark = getattr(cache, _MARK, None)
            if mark is not None and mark.choice is not None and mark.choice.routes and _is_filled(cache):
                self.choices.change_call(mark.choice)
                return
            if mark is not None and not _is_filled(cache):
                setattr(cache, _MARK, None)  # it was emptied for other text
        prompt = Prompt(mask_of_prompt(given), given.get("input_ids"), self.model())
        self.choices.change_call(dataclasses.replace(choice, prompt=prompt))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.calls.begin(self.calls.passes)
        self.choices.begin_call(self.setting, self.find_default)
        choice = self.choices.current()
        if choice is not None:
            self._check_choice(choice)
            if choice.router is not None:
                self._prepare_router(choice, module, args, kwargs)
        caches = _caches(args, kwargs)
        for cache in caches:
            self._check_layers(cache)
        if not self._watching:
            return
        for cache in caches:
            mark = getattr(cache, _MARK, None)
            if mark is not None:
                self.check(mark.origin)
            elif self._unmarked is not None and _is_filled(cache):
                self.check(self._unmarked)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            # After an exception there is no output: a cache that was refused keeps its origin.
            for cache in _caches(args, kwargs, output) if output is not None and self._watching else ():
                if getattr(cache, _MARK, None) is None:
                    setattr(cache, _MARK, _Mark(self, self._origin(), self.choices.current()))
                    kind: Any = cache_kind(cache)
                    cache.__class__ = _guarded(kind)
        finally:
            began_with = self.choices.end_call()
            self.calls.end(self.calls.passes)
        if output is not None and began_with is not None and began_with != self.setting:
            raise ConfigurationError(
                "donors were switched or changed within this call, by a hook: some of its layers ran before the change "
                "and some after it. Switch back before the hook returns, or switch between calls."
            )


def _off(disabled: frozenset[str]) -> str:
    return f"donors off: {', '.join(sorted(disabled))}" if disabled else "all donors on"


def _caches(*places: Any) -> list[Cache]:
    values: list[Any] = []
    for place in places:
        values += place.values() if isinstance(place, dict) else place if isinstance(place, tuple) else ()
    return [value for value in values if isinstance(value, Cache)]


def _is_filled(cache: Cache) -> bool:
    parts = [cache, getattr(cache, "self_attention_cache", None)]
    return any(_is_layer_filled(layer) for part in parts for layer in getattr(part, "layers", ()))


def _is_layer_filled(layer: Any) -> bool:
    if type(layer).__name__.startswith("Dummy"):  # has no cache, and counts as initialized from the start
        return False
    states = [getattr(layer, name, {}) for name in ("is_conv_states_initialized", "is_recurrent_states_initialized")]
    linear = [filled for state in states for filled in (state.values() if isinstance(state, dict) else [state])]
    # A static layer may have its memory before it holds anything.
    return any(linear) or (getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0)


@functools.cache
def _guarded(kind: Any) -> Any:
    """A subclass of a cache class that checks the origin at each use."""

    def checked(name: str) -> Any:
        original = getattr(kind, name)

        @functools.wraps(original)
        def method(self: Cache, *args: Any, **kwargs: Any) -> Any:
            mark = getattr(self, _MARK)
            if mark is not None:
                mark.guard.check(mark.origin)
            return original(self, *args, **kwargs)

        return method

    methods = {name: checked(name) for name in _GUARDED_METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, _KIND: kind, **methods})


def cache_kind(cache: Cache) -> type:
    """The class that a cache was made of."""
    return getattr(cache, _KIND, type(cache))
