"""A pickle machine that can only describe: globals are never imported, unknown ones become inert stand-ins.

`torch.load(weights_only=True)` refuses files that hold whole modules, and reads every tensor it does not refuse. Here
one reader serves both: the few functions that torch uses to describe tensors are replaced by ours, which build
descriptions, and every other global by a class that remembers its arguments and does nothing. The interpreter's
Python version of the machine is used on purpose: the C version can be made to reserve gigabytes by a few bytes.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError

__all__ = ["PICKLE_LIMIT", "Inert", "StorageRef", "TensorRef", "inert_load"]

PICKLE_LIMIT = 1 << 26

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
)


@dataclasses.dataclass(frozen=True, slots=True)
class StorageRef:
    """The description of a storage.

    Args:
        key: What the file calls it.
        dtype: The type of its elements.
        num_elements: How many it claims to hold.
    """

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRef:
    """The description of a tensor.

    Args:
        storage: Where its elements are.
        dtype: Their type.
        offset: Elements of the storage before the first.
        shape: Its dimensions.
        stride: Elements from one entry to the next, for each dimension.
    """

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """How many numbers it shows."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        """How many bytes it takes when written out."""
        return self.num_elements * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in order."""
        expected = 1
        for length, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True

    @property
    def last_element(self) -> int:
        """The number, in the storage, of the last element it shows."""
        return self.offset + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))


class Inert:
    """An object of a class that is not known here: its state, and no behaviour."""

    made_of = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...] = args
        self.state: Any = None
        self.items: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Keep what a list would."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.made_of}>"


class Mapping(dict[Any, Any]):
    """A dictionary of any kind; `OrderedDict` may carry attributes."""

    def __setstate__(self, state: Any) -> None:
        """Forget attributes such as `_metadata`."""


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
        raise CheckpointError(
            f"{what} could not be read as a pickle ({type(error).__name__}: {error}): it is cut short, damaged, or not "
            "what torch.save writes."
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


class _Machine(pickle._Unpickler):
    def __init__(self, file: _Limited, storages: dict[str, StorageRef]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; nothing is imported."""
        known = _KNOWN.get(f"{module}.{name}")
        if known is not None:
            return known
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _storage_type(name)
        return type(name.rpartition(".")[2] or "object", (Inert,), {"made_of": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> StorageRef:
        """Describe the storage that a tensor's description names."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError(f"unknown reference {pid!r}")
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("views of storages, as torch before 0.4 wrote them; save the file again")
        dtype, key, count = pid[1], pid[2], pid[4]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not _is_count(count):
            raise ValueError(f"unknown storage {pid!r}")
        ref = StorageRef(key, dtype, count)
        if self._storages.setdefault(key, ref) != ref:
            raise ValueError(f"storage {key!r} is described twice, differently")
        return ref


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> TensorRef:
    if rest[2:] and rest[2]:
        raise ValueError(f"a tensor is stored as a view ({rest[2]!r}); save it with .resolve_neg().resolve_conj()")
    sizes, steps = tuple(shape), tuple(stride)
    if not isinstance(storage, StorageRef) or not _is_count(offset) or len(sizes) != len(steps):
        raise ValueError(f"a tensor is described by {storage!r}, {offset!r}, {shape!r}, {stride!r}")
    if not all(map(_is_count, (*sizes, *steps))):
        raise ValueError(f"a tensor has shape {shape!r} and strides {stride!r}")
    return TensorRef(storage, dtype or storage.dtype, offset, sizes, steps)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *metadata: Any
) -> TensorRef:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor is of type {dtype!r}")
    return _tensor(storage, offset, shape, stride, requires_grad, hooks, *metadata, dtype=dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _rebuilt_from_type(build: Any, kind: Any, args: Any, *_: Any) -> Any:
    if build not in _TENSOR_BUILDERS:
        return Inert(build, kind, args)
    return build(*args)


def _storage_type(name: str) -> Any:
    return _STORAGE_TYPES.get(name, name)


_STORAGE_TYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
_TENSOR_BUILDERS: tuple[Callable[..., Any], ...] = (_tensor, _tensor_v3)
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": Mapping,
    "collections.defaultdict": lambda *_: Mapping(),
    "__builtin__.set": frozenset,
    "builtins.set": frozenset,
    "__builtin__.frozenset": frozenset,
    "builtins.frozenset": frozenset,
    "torch.Size": tuple,
    "torch._tensor._rebuild_from_type_v2": _rebuilt_from_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
