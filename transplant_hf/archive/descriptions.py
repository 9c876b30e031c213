"""What a pickle describes, once nothing of it is run: storages, tensors, and objects that do nothing."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["KNOWN", "SCRAMBLE", "STORAGE_TYPES", "Inert", "Mapping", "StorageRef", "TensorRef", "hashable", "is_count"]

# Python's hash of a number is the number, so that whoever writes a file could choose numbers that are all in each
# other's way in a dictionary. Their products with a secret are not.
SCRAMBLE = secrets.randbits(60) | 1

_MOST = 1 << 62
_MOST_DIMENSIONS = 64
_LONGEST_KEY = 1 << 12
_MOST_IN_KEY = 16


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
        return math.prod(self.shape)

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

    made_of = "an object that some other one returned"

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...] = args
        self.state: Any = None
        self.items: list[Any] = []

    def __call__(self, *_: Any) -> Inert:
        """Stand for what calling it would return."""
        return Inert()

    def append(self, item: Any) -> None:
        """Keep what a list would."""
        self.items.append(item)

    def __repr__(self) -> str:
        return f"<{self.made_of}>"


class Mapping(dict[Any, Any]):
    """A dictionary of any kind; what else it carries, such as `_metadata`, is forgotten."""


class _Number(int):
    """A whole number as a key."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(int.__mul__(self, SCRAMBLE))


def is_count(value: Any) -> bool:
    """Whether a value is a number of elements."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def hashable(value: Any) -> Any:
    """Return what stands for a value as a key, or as a member of a set.

    Texts and numbers name tensors. All else is only kept apart, and never hashed or compared by what it holds: that
    takes as long as it is large, every time, and whoever writes a file could choose keys that are all in each other's
    way.

    Raises:
        ValueError: No file needs such a key: a wide or nested tuple, a long text, a huge number.
        TypeError: It cannot be a key.
    """
    items = value if isinstance(value, tuple) else (value,)
    if len(items) > _MOST_IN_KEY:
        raise ValueError(f"a key is a tuple of {len(items)} items")
    for item in items:
        if (item is not value and isinstance(item, tuple)) or (isinstance(item, int) and item.bit_length() > 64):
            raise ValueError(f"a key is a nested tuple or a huge number ({type(item).__name__})")
    if type(value).__hash__ is None:
        raise TypeError(f"a key is a {type(value).__name__}")
    if isinstance(value, str) and len(value) > _LONGEST_KEY:
        raise ValueError(f"a key is a text of {len(value)} characters")
    if value is None or isinstance(value, str | bool):
        return value
    return _Number(value) if isinstance(value, int) else Inert(value)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> TensorRef:
    if rest[2:] and rest[2]:
        raise ValueError(
            "a tensor is stored as a negated or conjugated view; save it with .resolve_neg().resolve_conj()"
        )
    if not isinstance(storage, StorageRef) or not is_count(offset):
        raise ValueError(f"a tensor is described by a {type(storage).__name__} from a {type(offset).__name__}")
    sizes, steps = _size(shape), _size(stride)
    if len(sizes) != len(steps) or not all(map(is_count, (*sizes, *steps))):
        raise ValueError(f"a tensor has {len(sizes)} dimensions and {len(steps)} strides, not all of them counts")
    if math.prod(max(1, length) for length in sizes) >= _MOST:
        raise ValueError("a tensor has more elements than any memory holds")
    return TensorRef(storage, dtype or storage.dtype, offset, sizes, steps)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *metadata: Any
) -> TensorRef:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor's type is a {type(dtype).__name__}")
    return _tensor(storage, offset, shape, stride, requires_grad, hooks, *metadata, dtype=dtype)


def _rebuilt_from_type(build: Any, kind: Any, args: Any, *_: Any) -> Any:
    if build is not _tensor and build is not _tensor_v3:
        return Inert(build, kind, args)
    return build(*args)


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(values: Any = ()) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple) or len(values) > _MOST_DIMENSIONS:
        raise ValueError(f"a shape is a {type(values).__name__}, or has over {_MOST_DIMENSIONS} dimensions")
    return tuple(values)


def _set(values: Any = ()) -> frozenset[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"a set is made of a {type(values).__name__}")
    return frozenset(map(hashable, values))


def _mapping(items: Any = ()) -> Mapping:
    pairs = items.items() if isinstance(items, dict) else items
    return Mapping((hashable(key), value) for key, value in pairs)


def _default_mapping(_factory: Any = None, items: Any = ()) -> Mapping:
    return _mapping(items)


STORAGE_TYPES = {
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
KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "__builtin__.frozenset": _set,
    "builtins.frozenset": _set,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _rebuilt_from_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
