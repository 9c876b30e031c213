"""`using` blocks: which choice of donors applies to the code that runs, in threads, tasks and generators.

Nothing that calls share is changed: what a donor adds is left out where it was not chosen (`strength`), and its layers
run only on the rows that use it (`rows`). A row without donors gets exactly the recipient's output.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch

from ..errors import ConfigurationError
from .calls import OutputForm
from .choice import Choice

NOT_COMPILED = (
    'donors that choose themselves, by using("auto") or strength="auto", look at hidden states within a call, which a '
    "compiled call cannot. Call the model that is not compiled, or name the donors: using(rows=[...])."
)

# A compiled call cannot tell which of several tasks or generators of its thread it belongs to.
_AMBIGUOUS = Choice({}, "ambiguous")
# Settings of `generate` with calls that begin with a part of a prompt, or with another prompt.
_OTHER_PROMPTS = ("prefill_chunk_size", "guidance_scale")
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Call(NamedTuple):
    """An eager call in progress: the identity of its frame, its choice, and the setting of the model at its begin."""

    frame: int
    choice: Choice | None
    setting: Hashable


class _Thread:
    """The calls and the open blocks of one thread."""

    # These are read by what torch.compile traces, which cannot read context variables. Only the thread itself sets the
    # choice of its eager call. Blocks, which may end in any thread, set the choice outside such a call; that one is
    # right in code that neither an event loop nor a generator can interleave with other code.
    calling = False
    choice: Choice | None = None
    outside: Choice | None = None
    generating = False  # whether `generate` runs, in which a batch has several rows for each text

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.blocks: list[OpenBlock] = []

    def update_outside(self) -> None:
        """Set the choice of calls that do not look for it themselves: compiled calls, and calls of single layers."""
        seen = None
        while seen != self.blocks:  # blocks may end meanwhile, in other threads or by garbage collection
            seen = [*self.blocks]
            ambiguous = any(block.interleaved for block in seen)
            self.outside = _AMBIGUOUS if ambiguous else seen[-1].choice if seen else None

    def end_calls(self, first: int) -> None:
        """End all calls from a number on."""
        del self.calls[first:]
        self.calling = bool(self.calls)
        self.choice = self.calls[-1].choice if self.calls else None

    def forget_interrupted(self, frame: FrameType | None) -> None:
        """End the calls that Ctrl-C or the like ended, after which torch runs no hook."""
        while self.calls:
            # By identity: a reference to a frame would keep the model alive.
            outer = frame
            while outer is not None and id(outer) != self.calls[-1].frame:
                outer = outer.f_back
            if outer is not None:
                return
            self.end_calls(-1)


class CallChoices(threading.local):
    """The choices of one model's calls; `None` where no block applies.

    A block belongs to the context that it began in, so that tasks and `asyncio.to_thread` have their own. A block that
    began in a generator belongs to what the generator runs, however often it is suspended meanwhile.
    """

    def __init__(self, form: OutputForm) -> None:
        self.form = form  # how the layers of the model return their hidden state, in all threads
        self.thread = _Thread()
        # Where the last call that chose by itself sent each row.
        self.routes: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return CallChoices, (OutputForm(),)

    def begin_call(self, setting: Hashable, default: Callable[[], Choice | None]) -> None:
        """Find the choice of an eager call when it enters the decoder, and keep the setting of the model."""
        frame, thread = _module_call(sys._getframe(2)), self.thread
        thread.forget_interrupted(frame.f_back)
        choice = self._find() or default()
        thread.calls.append(_Call(id(frame), choice, setting))
        thread.calling, thread.choice = True, choice

    def change_call(self, choice: Choice) -> None:
        """Change the choice of the call in progress."""
        thread = self.thread
        thread.calls[-1] = _Call(thread.calls[-1].frame, choice, thread.calls[-1].setting)
        thread.choice = choice
        if choice.routes is not None:
            self.routes = choice.routes

    def end_call(self) -> Hashable:
        """Leave the decoder; returns the setting at the begin, or `None` if the call did not begin."""
        frame, thread = id(_module_call(sys._getframe(2))), self.thread
        for number in reversed(range(len(thread.calls))):
            if thread.calls[number].frame == frame:
                setting = thread.calls[number].setting
                thread.end_calls(number)
                return setting
        return None

    def current(self) -> Choice | None:
        """The choice for the code that runs now; within a call the choice of the call."""
        self.thread.forget_interrupted(sys._getframe())
        return self.thread.choice if self.thread.calling else self._find()

    @contextlib.contextmanager
    def generation(self, texts: int) -> Iterator[None]:
        """Run `generate` on a number of texts, each of which may become several rows."""
        choice, thread = self.current(), self.thread
        if choice is not None:
            choice.check_rows(texts)
        before, thread.generating = thread.generating, True
        try:
            yield
        finally:
            thread.generating = before

    def of_layer(self, hidden: torch.Tensor) -> Choice | None:
        """The choice for a layer that runs now, compiled or not, on a hidden state `[batch, ...]`."""
        if not torch.compiler.is_compiling():
            self.thread.forget_interrupted(sys._getframe())
        choice = self.thread.choice if self.thread.calling else self.thread.outside
        if choice is not None and choice.key == _AMBIGUOUS.key:
            raise ConfigurationError(
                "a compiled call cannot tell which using(...) block it belongs to while one is open in a coroutine or "
                "a generator of its thread. Begin the block in a function that runs the compiled model (as one for "
                "asyncio.to_thread), or call the model that is not compiled."
            )
        if choice is not None and choice.router is not None and not self.thread.calling:
            raise ConfigurationError(NOT_COMPILED)
        if choice is not None:
            choice.check_rows(hidden.shape[0], self.thread.generating)
        return choice

    def _find(self) -> Choice | None:
        """The choice of the innermost block around the code that runs now."""
        blocks = _blocks.get()
        if not blocks and not _generators:
            return None
        nearest = self.block_of_generator()
        for block in reversed(blocks):
            if block.choices is not self or block.closed:
                continue
            if block.generator is None:
                if nearest is None or nearest in block.outer:
                    return block.choice
            elif nearest is None and block.place != _place():
                raise ConfigurationError(
                    "this call was started in another thread or task while a generator had a using(...) block open, "
                    "and cannot tell whether it belongs to the block. Begin the block in the function that runs there."
                )
        return nearest.choice if nearest else None

    def block_of_generator(self) -> OpenBlock | None:
        """The block of the innermost generator that runs now and has one."""
        frame: FrameType | None = sys._getframe() if _generators else None
        while frame is not None:
            for block in reversed(_generators.get(frame, ())):
                if block.choices is self:
                    return block
            frame = frame.f_back
        return None


class OpenBlock:
    """A `using` block from its begin to its end."""

    def __init__(self, choices: CallChoices, choice: Choice) -> None:
        self.choices, self.choice = choices, choice
        self.closed = False

    def __enter__(self) -> None:
        # The block begins in the function that calls `Block.__enter__`.
        self.generator, self.interleaved = _generator_of(sys._getframe(2))
        self.place = _place()
        nearest = self.choices.block_of_generator()
        self.outer: tuple[OpenBlock, ...] = (*nearest.outer, nearest) if nearest else ()
        self._token: Any = _blocks.set((*(block for block in _blocks.get() if not block.closed), self))
        if self.generator is not None:
            _generators.setdefault(self.generator, []).append(self)
        self._thread = self.choices.thread
        self._thread.blocks.append(self)
        self._thread.update_outside()

    def __exit__(self, *error: object) -> None:
        """End the block, innermost or not, in any context or thread; calls in progress go on as they began."""
        blocks = _blocks.get()
        try:
            _blocks.reset(self._token)
            # Contexts that were copied from this one keep the block: a task may outlive the block around its creation.
            self.closed = self.generator is not None
        except ValueError:  # it began in another context, of which this one may be a copy
            self.closed = True
        self._token = None
        _blocks.set(tuple(block for block in blocks if block is not self))
        if self.generator is not None:
            _generators[self.generator].remove(self)
            if not _generators[self.generator]:
                del _generators[self.generator]
        # Frames and tasks hold the arguments of calls.
        self.generator, self.place = None, (0, None)
        self._thread.blocks.remove(self)
        self._thread.update_outside()


# The open blocks of this context, of all models, in the order in which they began.
_blocks: ContextVar[tuple[OpenBlock, ...]] = ContextVar("transplant_hf_using", default=())
# The blocks that began in generators, by the generator's frame.
_generators: dict[FrameType, list[OpenBlock]] = {}


def _place() -> tuple[int, Any]:
    """The thread, and the task if an event loop runs it."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        return threading.get_ident(), None


def _module_call(frame: FrameType) -> FrameType:
    """The frame in which torch calls a module, given the frame that calls a hook."""
    return frame.f_back if frame.f_code.co_name == "inner" and frame.f_back else frame


def _generator_of(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """The innermost generator that runs a frame, and whether other code of the thread may run before it ends."""
    while frame is not None:
        flags, back = frame.f_code.co_flags, frame.f_back
        # A generator that contextlib runs is a context manager: the block belongs to its caller.
        files = [one.f_code.co_filename for one in (frame, back if flags & _GENERATOR else None) if one is not None]
        if contextlib.__file__ not in files:
            if flags & (_GENERATOR | inspect.CO_COROUTINE):
                return frame if flags & _GENERATOR else None, True
            if frame.f_code.co_name == "<module>":
                break  # a notebook runs its cells in coroutines, one after another
        frame = back
    return None, False


def generating(generate: Any) -> Any:
    """Let the `generate` of a model class check that a choice by row has an entry for each text."""

    @functools.wraps(generate)
    def generate_for_texts(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._transplant is None:
            return generate(self, *args, **kwargs)
        # Where `generate` looks for them, before it repeats them.
        names = ("inputs", self.main_input_name, "inputs_embeds")
        found = (*args[:1], *(kwargs.get(name) for name in names), *kwargs.values())
        texts = next((value.shape[0] for value in found if isinstance(value, torch.Tensor)), 1)
        choice = self._transplant.current_choice
        if choice is not None and choice.router is not None:
            for name in _OTHER_PROMPTS:
                # Transformers does nothing for a guidance_scale of 1.
                if generation_setting(self, kwargs, name) not in (None, 0, 1):
                    raise ConfigurationError(
                        f'using("auto") reads the beginning of each prompt in one call, and with {name} there are '
                        f"others. Leave out {name}, or name the donors of each row: using(rows=[...])."
                    )
        with self._transplant.choices.generation(texts):
            return generate(self, *args, **kwargs)

    return generate_for_texts


def generation_setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Return a setting as `generate` finds it: a configuration that is passed leaves to the model's what it lacks."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((one for one in found if one is not None), None)


class Block(contextlib.ContextDecorator):
    """The result of `model.using(...)` and `model.disable_transplants(...)`.

    It can decorate functions; each call of such a function begins a block of its own.
    """

    def __init__(self, begin: Callable[[], contextlib.AbstractContextManager[None]], nests: bool) -> None:
        self._begin, self._nests = begin, nests
        self._open: list[contextlib.AbstractContextManager[None]] = []

    def _recreate_cm(self) -> Block:
        return Block(self._begin, self._nests)

    def __call__(self, func: Any) -> Any:
        """Decorate a function."""
        runs_later = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
        if any(kind(func) for kind in runs_later):
            raise ConfigurationError(
                f"using(...) and disable_transplants() cannot decorate {getattr(func, '__qualname__', func)!r}: the "
                "body of a coroutine or generator function runs after the call. Write the block as a with statement "
                "inside the function."
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        if self._open and not self._nests:
            raise ConfigurationError("this using(...) block is open already; call model.using(...) for each block.")
        block = self._begin()
        block.__enter__()
        self._open.append(block)

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error) if self._open else None
