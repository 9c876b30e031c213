"""Which donors the calls of one thread use, and in which rows of a batch, while the model stays as it is.

All donors run in every call; what one of them adds is left out where it is not wanted. So nothing that calls share is
changed, every layer's cache is filled alike, and a row without donors gets exactly what the recipient computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch

from ..architecture import text_config
from ..architecture.exceptions import ROWS_APART
from ..errors import ConfigurationError
from ..numeric import finite_number
from ..splice import Blueprint

__all__ = ["Block", "Choice", "Requests", "Wanted", "read_request"]


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What a call wants of each donor.

    Args:
        strengths: By donor: a number for all rows, or `[rows]` in float32.
        key: Equal for requests that want the same.
        replacing: The donors that replaced layers when the block began; a call cannot do without them.
    """

    strengths: Mapping[str, float | torch.Tensor]
    key: Hashable
    replacing: frozenset[str] = frozenset()

    @property
    def named(self) -> set[str]:
        """The inserted donors that are not left out."""
        return {name for name, value in self.strengths.items() if isinstance(value, torch.Tensor) or value != 0}


# A compiled call cannot tell which of several tasks or generators of its thread it belongs to.
_UNSURE = Wanted({}, "unsure")
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Call(NamedTuple):
    """An eager call that is under way: the identity of its frame, what it wants, and the side that it entered on."""

    frame: int
    wanted: Wanted | None
    side: Hashable


class _Thread:
    """What is known of one thread."""

    # Read by what torch.compile traces, which cannot read context variables. Only the thread itself says what its
    # eager call wants; blocks, which may end in any thread, say what holds outside such a call. The latter is right in
    # code that neither an event loop nor a generator can interleave with other code.
    calling = False
    wanted: Wanted | None = None
    outside: Wanted | None = None

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.open: list[_Block] = []

    def settle(self) -> None:
        """Say what calls want that do not look for themselves: compiled ones, and those of single layers."""
        seen = None
        while seen != self.open:  # blocks may end in other threads meanwhile, or when garbage is collected
            seen = [*self.open]
            unsure = any(block.interleaved for block in seen)
            self.outside = _UNSURE if unsure else seen[-1].wanted if seen else None

    def drop(self, first: int) -> None:
        """Let calls be over, from one on."""
        del self.calls[first:]
        self.calling = bool(self.calls)
        self.wanted = self.calls[-1].wanted if self.calls else None

    def forget_interrupted(self, frame: FrameType | None) -> None:
        """Let calls be over that ended by Ctrl-C or the like, after which torch runs no hook.

        Args:
            frame: The innermost that a call under way may have.
        """
        while self.calls:
            # By identity: a frame that is kept would keep the model.
            around = frame
            while around is not None and id(around) != self.calls[-1].frame:
                around = around.f_back
            if around is not None:
                return
            self.drop(-1)


class Requests(threading.local):
    """What the calls of a model want; `None` where it is used as it is set.

    A `using` block belongs to the context that it began in, so that tasks and `asyncio.to_thread` have their own; one
    that began in a generator belongs to what that generator runs, however often it is suspended meanwhile.
    """

    def __init__(self) -> None:
        self.thread = _Thread()

    def __reduce__(self) -> Any:
        return Requests, ()

    def begin_call(self, side: Hashable) -> None:
        """Settle what an eager call wants, where it enters the decoder, and keep the side that it enters on."""
        frame, thread = _module_call(sys._getframe(2)), self.thread
        thread.forget_interrupted(frame.f_back)
        wanted = self.found()
        thread.calls.append(_Call(id(frame), wanted, side))
        thread.calling, thread.wanted = True, wanted

    def end_call(self) -> Hashable:
        """Leave the decoder again; returns the side, `None` if the call did not begin."""
        frame, thread = id(_module_call(sys._getframe(2))), self.thread
        for number in reversed(range(len(thread.calls))):
            if thread.calls[number].frame == frame:
                side = thread.calls[number].side
                thread.drop(number)
                return side
        return None

    def now(self) -> Wanted | None:
        """What the code that runs now wants: within a call what the call wants."""
        self.thread.forget_interrupted(sys._getframe())
        return self.thread.wanted if self.thread.calling else self.found()

    def known(self) -> Wanted | None:
        """What a layer is to do, be it compiled or not.

        Raises:
            ConfigurationError: A compiled call cannot know.
        """
        if not torch.compiler.is_compiling():
            self.thread.forget_interrupted(sys._getframe())
        wanted = self.thread.wanted if self.thread.calling else self.thread.outside
        if wanted is not None and wanted.key == _UNSURE.key:
            raise ConfigurationError(
                "a compiled call cannot tell which using(...) block it belongs to while one is open in a coroutine or "
                "a generator of its thread. Begin the block in a function that runs the compiled model (as one for "
                "asyncio.to_thread), or call the model that is not compiled."
            )
        return wanted

    def found(self) -> Wanted | None:
        """Find the innermost block around the code that runs now.

        Raises:
            ConfigurationError: The call was passed on by a generator, whose block may or may not be meant for it.
        """
        blocks = _blocks.get()
        if not blocks and not _generators:
            return None
        near = self.generators_block()
        for block in reversed(blocks):
            if block.requests is not self or block.closed:
                continue
            if block.generator is None:
                if near is None or near in block.around:
                    return block.wanted
            elif near is None and block.place != _place():
                raise ConfigurationError(
                    "this call was started in another thread or task while a generator had a using(...) block open, "
                    "and cannot tell whether it belongs to the block. Begin the block in the function that runs there."
                )
        return near.wanted if near else None

    def generators_block(self) -> _Block | None:
        """The block of the innermost generator that runs now and has one."""
        frame: FrameType | None = sys._getframe() if _generators else None
        while frame is not None:
            for block in reversed(_generators.get(frame, ())):
                if block.requests is self:
                    return block
            frame = frame.f_back
        return None


class _Block:
    """A `using` block while it is open.

    Args:
        requests: Of the model.
        wanted: What it chooses.
        frame: Where it begins.
    """

    def __init__(self, requests: Requests, wanted: Wanted, frame: FrameType) -> None:
        self.requests, self.wanted = requests, wanted
        self.generator, self.interleaved = _runner(frame)
        self.place = _place()
        self.closed = False
        near = requests.generators_block()
        self.around: tuple[_Block, ...] = (*near.around, near) if near else ()
        self._token: Any = _blocks.set((*(block for block in _blocks.get() if not block.closed), self))
        if self.generator is not None:
            _generators.setdefault(self.generator, []).append(self)
        self._thread = requests.thread
        self._thread.open.append(self)
        self._thread.settle()

    def close(self) -> None:
        """End it, innermost or not, in whatever context or thread; calls that are under way go on as they began."""
        blocks = _blocks.get()
        try:
            _blocks.reset(self._token)
            # Contexts that were copied from this one keep it: a task may outlive the block that it was made in.
            self.closed = self.generator is not None
        except ValueError:  # it began in another context, maybe the one that this is a copy of, and ends there too
            self.closed = True
        self._token = None
        _blocks.set(tuple(block for block in blocks if block is not self))
        if self.generator is not None:
            _generators[self.generator].remove(self)
            if not _generators[self.generator]:
                del _generators[self.generator]
        # Frames and tasks hold the arguments of calls.
        self.generator, self.place = None, (0, None)
        self._thread.open.remove(self)
        self._thread.settle()


# The blocks that are open in this context, of all models, in the order in which they began.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("transplant_hf_using", default=())
# Those that began in generators, by the generator's frame.
_generators: dict[FrameType, list[_Block]] = {}


def _place() -> tuple[int, Any]:
    """The thread, and the task if an event loop runs it."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        return threading.get_ident(), None


def _module_call(frame: FrameType) -> FrameType:
    """The frame in which torch calls a module, from the one that calls a hook."""
    return frame.f_back if frame.f_code.co_name == "inner" and frame.f_back else frame


def _runner(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """Find the innermost generator that runs a frame, and whether other code of the thread may run before it ends."""
    while frame is not None:
        flags, back = frame.f_code.co_flags, frame.f_back
        # A generator that contextlib runs is a context manager: the block is its caller's.
        if not _of_contextlib(frame) and not (back is not None and _of_contextlib(back) and flags & _GENERATOR):
            if flags & (_GENERATOR | inspect.CO_COROUTINE):
                return frame if flags & _GENERATOR else None, True
            if frame.f_code.co_name == "<module>":
                break  # a notebook's cells run inside coroutines, one after another
        frame = back
    return None, False


def _of_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__


class _Decorator(contextlib.ContextDecorator):
    """A block that can be put around functions, each call of which opens its own."""

    def __call__(self, func: Any) -> Any:
        later = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
        if any(kind(func) for kind in later):
            raise ConfigurationError(
                f"using(...) and disable_transplants() cannot decorate {getattr(func, '__qualname__', func)!r}: a call "
                "of a coroutine or generator function only makes what runs after the block. Write the block as a with "
                "statement inside the function."
            )
        return super().__call__(func)


class Block(_Decorator):
    """What `model.disable_transplants(...)` returns.

    Args:
        begin: Makes a block that is used once.
    """

    def __init__(self, begin: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._begin = begin
        self._open: list[contextlib.AbstractContextManager[None]] = []

    def _recreate_cm(self) -> Block:
        return Block(self._begin)

    def __enter__(self) -> None:
        block = self._begin()
        block.__enter__()
        self._open.append(block)

    def __exit__(self, *raised: Any) -> bool | None:
        return self._open.pop().__exit__(*raised)


class Choice(_Decorator):
    """What `model.using(...)` returns: a block in which calls use chosen donors.

    Args:
        read: Checks the choice, and returns where it holds and what it is.
    """

    def __init__(self, read: Callable[[], tuple[Requests, Wanted]]) -> None:
        self._read = read
        self._block: _Block | None = None

    def _recreate_cm(self) -> Choice:
        return Choice(self._read)

    def __enter__(self) -> None:
        if self._block is not None:
            raise ConfigurationError("this using(...) block is open already; call model.using(...) for each block.")
        requests, wanted = self._read()
        self._block = _Block(requests, wanted, sys._getframe(1))

    def __exit__(self, *raised: object) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.close()


def read_request(blueprint: Blueprint, donors: Any, rows: Sequence[Any] | None) -> Wanted:
    """Turn the arguments of `model.using` into a strength for each donor.

    Args:
        blueprint: What the model runs.
        donors: A donor's name, several, or `{name: strength}`; a strength is a number or one for each row.
        rows: For each row of the batch, what `donors` takes for one; `None` for a row without donors.

    Returns:
        The strengths; 0 for donors that are not named.

    Raises:
        ConfigurationError: No such donor, a strength that is not finite, lists of different lengths, or a donor that
            replaces layers and would have to be left out or scaled.
    """
    if (donors is None) == (rows is None):
        raise ConfigurationError(
            'say which donors to use: using("law"), using({"law": 0.5}), using(()) for none, or one entry for each row '
            'of the batch: using(rows=["law", None]).'
        )
    blueprint.refuse_scaling()
    if rows is None:
        strengths: dict[str, Any] = _of_one(blueprint, donors)
    elif isinstance(rows, str) or not isinstance(rows, Sequence) or not len(rows):
        raise ConfigurationError(f"rows must be a list with an entry for each row of the batch, got {rows!r}.")
    else:
        each = [_of_one(blueprint, () if row is None else row) for row in rows]
        strengths = {name: [row[name] for row in each] for name in each[0]}
    checked = {name: _strength(blueprint, name, value) for name, value in strengths.items()}
    lengths = {name: len(value) for name, value in checked.items() if isinstance(value, tuple)}
    if len(set(lengths.values())) > 1:
        raise ConfigurationError(f"each donor needs a strength for every row of the same batch, got {lengths} of them.")
    _refuse_leaving_out(blueprint, checked)
    if lengths:
        _refuse_rows(blueprint)
    inserted = {name: value for name, value in checked.items() if blueprint.part(name).spec.mode == "insert"}
    tensors = {
        name: torch.tensor(value, dtype=torch.float32) if isinstance(value, tuple) else value
        for name, value in inserted.items()
    }
    return Wanted(tensors, tuple(sorted(inserted.items())))


def _of_one(blueprint: Blueprint, donors: Any) -> dict[str, Any]:
    known = blueprint.splice.names
    if isinstance(donors, Mapping):
        named = dict(donors)
    elif isinstance(donors, str | Iterable):
        chosen = [donors] if isinstance(donors, str) else list(donors)
        named = {name: blueprint.part(name).spec.strength if name in known else None for name in chosen}
    else:
        raise ConfigurationError(f"donors are named by a name, several, or {{name: strength}}; got {donors!r}.")
    for name in named:
        blueprint.check_name(name)
    return {name: named.get(name, 0.0) for name in known}


def _strength(blueprint: Blueprint, name: str, value: Any) -> float | tuple[float, ...]:
    found = tuple(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1 else (value,)
    what = f"the strength of donor {name!r}, or each of a list with one for each row,"
    if not found:
        raise ConfigurationError(f"{what} must be a finite number, got {value!r}.")
    each = tuple(finite_number(one, what) for one in found)
    # Where all rows want the same, nothing depends on the size of the batch.
    return each if len(set(each)) > 1 else each[0]


def _refuse_rows(blueprint: Blueprint) -> None:
    model_type = text_config(blueprint.recipient.config).config.model_type
    if model_type in ROWS_APART:
        raise ConfigurationError(
            f"rows of a batch cannot use different donors in a {model_type} model: {ROWS_APART[model_type]}. Make a "
            "call for each choice."
        )


def _refuse_leaving_out(blueprint: Blueprint, strengths: Mapping[str, float | tuple[float, ...]]) -> None:
    for name, value in strengths.items():
        if blueprint.part(name).spec.mode == "replace" and value != 1.0:
            raise ConfigurationError(
                f"donor {name!r} replaces recipient layers, so that a call cannot leave it out or scale it. Name it in "
                f"every call, or switch it off for all calls: disable_transplants({name!r})."
            )
