"""The calls of a model that are in progress, so that donors change between calls and never within one.

A change waits until the calls of other threads end, and calls that begin meanwhile wait for the change. Saving and
copying count as calls. Compiled calls are not counted: torch.compile leaves the counting out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError

BLOCK_END = "the end of disable_transplants()"
LONGEST_WAIT = 60.0
# Arguments that hold what a model keeps between calls; "cache" from Transformers 5.24 on. Only the first two are always
# a `Cache`.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_POLL_SECONDS = 0.2


class Calls:
    """The calls of one model; the copy of a model has none in progress."""

    def __init__(self) -> None:
        # The depth of nested calls by thread: passes through the decoder, and calls of several passes.
        self.passes: dict[int, int] = {}
        self._generations: dict[int, int] = {}
        self._turn = threading.RLock()
        self._ended = threading.Condition()
        # The thread that changes the model or waits to, and whether it waits for calls of several passes too.
        self._closed: tuple[int, bool] | None = None
        # A change that was requested and could not be made yet.
        self.overdue: Callable[[], None] | None = None
        self._changes = 0
        # The number of changes when each thread last began to copy or pickle the model.
        self._copying = threading.local()

    def __reduce__(self) -> Any:
        return Calls, ()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Run a call that needs the same layers from begin to end: several passes, or a walk over the model."""
        self.begin(self._generations)
        try:
            yield
        finally:
            self.end(self._generations)

    @property
    def change_waits(self) -> bool:
        """Whether another thread changes the model, or waits to."""
        closed = self._closed
        return closed is not None and closed[0] != threading.get_ident()

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Be the only thread that prepares a change; calls go on."""
        end = time.monotonic() + LONGEST_WAIT
        while not self._turn.acquire(timeout=_POLL_SECONDS):
            closed = self._closed
            if closed is not None and threading.get_ident() in self._threads(closed[1]):
                raise ConfigurationError(
                    f"{what} was called within a call of the model, while another thread waits for this very call to "
                    "end before it changes the model. Choose donors by call with using(...), which does not change the "
                    "model."
                )
            if time.monotonic() > end:
                raise _too_long(what, "a change by another thread has")
        try:
            if self.overdue is not None and threading.get_ident() not in self._threads(True):
                overdue, self.overdue = self.overdue, None
                made = False
                try:
                    overdue()
                    made = True
                finally:
                    self.overdue = self.overdue if made else overdue
            yield
        finally:
            self._turn.release()

    @contextmanager
    def alone(self, what: str, generations: bool = True) -> Iterator[None]:
        """Change the model while no other thread calls it."""
        with self.turn(what):
            before, self._closed = self._closed, (threading.get_ident(), generations)
            try:
                self._wait(what, generations)
                self._changes += 1
                yield
            finally:
                with self._ended:
                    self._closed = before
                    self._ended.notify_all()

    def begin_copy(self) -> None:
        """Note that this thread begins to copy or pickle the model."""
        with self.generation():
            self._copying.changes = self._changes

    def check_copy(self) -> None:
        """Refuse a copy during which donors changed: no change can wait for the end of pickling."""
        if getattr(self._copying, "changes", self._changes) != self._changes:
            raise ConfigurationError(
                "another thread switched or changed donors while this model was pickled or copied. Try again between "
                "the changes, or use save_pretrained: changes by other threads wait until it ends."
            )

    def begin(self, kind: dict[int, int]) -> None:
        """Begin a call; wait while another thread changes the model."""
        me = threading.get_ident()
        if self.overdue is not None and me not in self._threads(True):
            with self.turn(BLOCK_END):  # makes the overdue change
                pass
        with self._ended:
            while self._closed is not None and self._closed[0] != me and me not in self._threads(self._closed[1]):
                self._ended.wait()
            kind[me] = kind.get(me, 0) + 1

    def end(self, kind: dict[int, int]) -> None:
        """End a call, by an exception too."""
        me = threading.get_ident()
        with self._ended:
            left = kind.pop(me, 0) - 1
            if left > 0:
                kind[me] = left
            else:
                self._ended.notify_all()

    def _threads(self, generations: bool) -> set[int]:
        return {*self.passes, *(self._generations if generations else ())}

    def _wait(self, what: str, generations: bool) -> None:
        end = time.monotonic() + LONGEST_WAIT
        with self._ended:
            while others := self._threads(generations) - {threading.get_ident()}:
                if time.monotonic() > end:
                    raise _too_long(what, f"calls of {len(others)} other threads have")
                if not self._ended.wait(_POLL_SECONDS):
                    self._forget_interrupted()

    def _forget_interrupted(self) -> None:
        """Drop passes that Ctrl-C ended, after which torch runs no hook, and threads that have ended."""
        frames = sys._current_frames()
        for kind in (self.passes, self._generations):
            for thread in list(kind):
                frame = frames.get(thread)
                while frame is not None and kind is self.passes and frame.f_code is not nn.Module._call_impl.__code__:
                    frame = frame.f_back
                if frame is None:
                    del kind[thread]


def _too_long(what: str, who: str) -> ConfigurationError:
    outcome = "stay as they are. Try again when they have ended"
    if what == BLOCK_END:
        outcome = "are switched back by the next call or change that begins when they have ended. Wait for that"
    return ConfigurationError(
        f"{what} changes the model, and {who} not ended for {LONGEST_WAIT:g} seconds; the donors {outcome}, or choose "
        "donors by call with using(...), which does not change the model."
    )


def counted(method: Any) -> Any:
    """Let a method of a model class count as a call, so that donors do not change while it runs."""

    @functools.wraps(method)
    def counted_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._transplant is None:
            return method(self, *args, **kwargs)
        with self._transplant.calls.generation():
            return method(self, *args, **kwargs)

    return counted_method


@counted
def deep_copy(model: Any, memo: dict[int, Any]) -> Any:
    """The `__deepcopy__` of a model with donors."""
    make, args, state = model.__reduce_ex__(4)[:3]
    new = memo[id(model)] = make(*args)
    new.__setstate__(copy.deepcopy(state, memo))
    return new


@functools.cache
def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters of a method, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a module by name."""
    return {**dict(zip(parameters_of(type(module).forward), args, strict=False)), **kwargs}


class OutputForm:
    """How the layers of a model return their hidden state; known after one of them has run."""

    _form: tuple[Any, int] = (None, 0)  # the type, and how many `None` follow: together, for other threads

    def learn(self, output: Any) -> None:
        """Learn it from an output; nothing where layers return more than a hidden state."""
        if isinstance(output, torch.Tensor):
            self._form = (torch.Tensor, 0)
        elif type(output) in (tuple, list) and output and all(one is None for one in output[1:]):
            self._form = (type(output), len(output) - 1)

    @property
    def known(self) -> bool:
        """Whether a layer has run."""
        return self._form[0] is not None

    def wrap(self, hidden: torch.Tensor) -> Any:
        """Return a hidden state as a layer does."""
        kind, others = self._form
        return hidden if kind is torch.Tensor else kind([hidden, *[None] * others])
