"""A pickle machine that can only describe: globals are never imported, unknown ones become inert stand-ins.

`torch.load(weights_only=True)` refuses files that hold whole modules, and reads every tensor it does not refuse. Here
one reader serves both: the few functions that torch uses to describe tensors are replaced by ours, which build
descriptions, and every other global by a class that remembers its arguments and does nothing. The interpreter's
Python version of the machine is used on purpose: the C version can be made to reserve gigabytes by a few bytes. Every
step that could change what already exists, or take much time or memory for few bytes, is replaced by one that cannot.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .descriptions import KNOWN, SCRAMBLE, STORAGE_TYPES, Inert, Mapping, StorageRef, hashable, is_count

__all__ = ["PICKLE_LIMIT", "inert_load"]

PICKLE_LIMIT = 1 << 26
_MOST_STEPS = 1 << 22
_MOST_GLOBALS = 10_000
_LONGEST_NAME = 500
_LONGEST_REASON = 300

# What the machine raises for a pickle that is cut short or makes no sense.
_PICKLE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def inert_load(file: BinaryIO, what: str, storages: dict[str, StorageRef] | None = None) -> Any:
    """Read one pickle as a description.

    Args:
        file: Read from its present place to the end of the pickle.
        what: The file, for messages.
        storages: Receives every storage that is mentioned, by key.

    Returns:
        Plain values and containers, `TensorRef` for tensors, `Inert` for all else.

    Raises:
        CheckpointError: Not a pickle, or cut short.
    """
    try:
        return _Machine(_Limited(file), {} if storages is None else storages).load()
    except _PICKLE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{what} could not be read as a pickle ({reason[:_LONGEST_REASON]}): it is cut short, damaged, or not what "
            "torch.save writes. Get it again from its author, or save the layers' state dicts anew."
        ) from error


class _Limited:
    """A file that ends after `PICKLE_LIMIT` bytes, so that no length in a pickle can ask for more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, PICKLE_LIMIT

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left))

    def _counted(self, found: bytes) -> bytes:
        self._left -= len(found)
        return found


class _Steps(dict[int, Callable[[Any], None]]):
    """What to do for each code, handed out a limited number of times."""

    left = _MOST_STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"it takes over {_MOST_STEPS} steps")

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.spend(1)
        return super().__getitem__(code)


class _Memo(dict[int, Any]):
    """What was kept, by numbers that the file chooses: see `SCRAMBLE`."""

    def __getitem__(self, number: int) -> Any:
        return dict.__getitem__(self, number * SCRAMBLE)

    def __setitem__(self, number: int, value: Any) -> None:
        dict.__setitem__(self, number * SCRAMBLE, value)


class _Machine(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: _Limited, storages: dict[str, StorageRef]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.memo = _Memo()
        self._storages = storages
        self._globals: dict[tuple[str, str], Any] = {}
        self.dispatch = self._steps = _Steps(_CODES)  # type: ignore[misc]

    # -- Names and references ------------------------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; nothing is imported."""
        found = self._globals.get((module, name))
        if found is None:
            if len(self._globals) >= _MOST_GLOBALS:
                raise ValueError(f"it names over {_MOST_GLOBALS} classes and functions")
            found = self._globals[module, name] = _stand_in(module, name)
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Describe the storage that a tensor's description names; old files name classes of modules here too."""
        if not isinstance(pid, tuple) or not pid or not isinstance(pid[0], str):
            raise ValueError("unknown reference")
        if pid[0] == "module" and len(pid) == 4 and isinstance(pid[1], type):
            return pid[1]
        if pid[0] != "storage" or len(pid) not in (5, 6):
            raise ValueError(f"unknown reference to a {pid[0][:80]!r}")
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("views of storages, as torch before 0.4 wrote them; save the file again")
        dtype, key, count = pid[1], pid[2], pid[4]
        named = isinstance(key, str) and len(key) <= _LONGEST_NAME
        if not isinstance(dtype, torch.dtype) or not named or not is_count(count):
            raise ValueError("unknown kind of storage")
        ref = StorageRef(key, dtype, count)
        if self._storages.setdefault(key, ref) != ref:
            raise ValueError(f"storage {key[:80]!r} is described twice, differently")
        return ref

    # -- Steps that differ from the interpreter's ------------------------------------------------------------------

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, list | tuple):
            raise ValueError(f"arguments are a {type(args).__name__}")
        self._steps.spend(len(args) + sum(len(arg) for arg in args if isinstance(arg, list | tuple | dict)))
        return function(*args)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._call(klass, args))

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _reduce_with_names(self) -> None:
        self.stack.pop()
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, Mapping):
            raise ValueError(f"it gives a state to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, dict):
                target[hashable(key)] = value
            elif isinstance(target, Inert):
                target.append((key, value))
            else:
                raise ValueError(f"it sets items of a {type(target).__name__}")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_many(self) -> None:
        self._set_items(self.pop_mark())  # type: ignore[attr-defined]

    def _dict(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.append({})
        self._set_items(items)

    def _frozen_set(self) -> None:
        self.append(frozenset(map(hashable, self.pop_mark())))  # type: ignore[attr-defined]

    def _add_items(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(hashable, items))
        elif isinstance(target, Inert):
            target.items += items
        else:
            raise ValueError(f"it adds items to a {type(target).__name__}")

    def _bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(size)))  # type: ignore[attr-defined]


def _stand_in(module: str, name: str) -> Any:
    if not (module + name).isprintable() or len(module + name) > _LONGEST_NAME:
        raise ValueError(f"it names a class or function {(module + '.' + name)[:80]!r}")
    known = KNOWN.get(f"{module}.{name}")
    if known is not None:
        return known
    if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
        return found
    if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
        return STORAGE_TYPES.get(name, name)
    return type(name.rpartition(".")[2] or "object", (Inert,), {"made_of": f"{module}.{name}"})


def _codes() -> dict[int, Callable[[Any], None]]:
    codes: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)
    ours: dict[bytes, Callable[[Any], None]] = {
        pickle.ADDITEMS: _Machine._add_items,
        pickle.BUILD: _Machine._build,
        pickle.BYTEARRAY8: _Machine._bytearray,
        pickle.DICT: _Machine._dict,
        pickle.FROZENSET: _Machine._frozen_set,
        pickle.NEWOBJ: _Machine._reduce,
        pickle.NEWOBJ_EX: _Machine._reduce_with_names,
        pickle.REDUCE: _Machine._reduce,
        pickle.SETITEM: _Machine._set_item,
        pickle.SETITEMS: _Machine._set_many,
    }
    codes.update({code[0]: step for code, step in ours.items()})
    # The registry of extensions belongs to the whole process; buffers lie outside the file.
    for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        del codes[code[0]]
    return codes


_CODES = _codes()
