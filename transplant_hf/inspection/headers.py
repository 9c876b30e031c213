"""What safetensors files say of their tensors, checked before anything relies on it; no tensor is read.

The library's own reader maps whole files, and the Hub client's believes what a header claims. Here one reader serves
files and repositories alike: it asks for the bytes it wants.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..donor.dtypes import loaded_dtype
from ..donor.tensors import TensorInfo
from ..errors import CheckpointError
from ..numeric import is_whole

__all__ = ["HeaderTensors", "TensorHeader", "read_header"]

# Of a first read: most headers are shorter, and reading more would cost the others more.
_FIRST_READ = 1 << 15
_LENGTH = 8
# The format's own limit.
_LONGEST = 100_000_000
_MOST_DIMENSIONS = 64
_DTYPE = re.compile(r"[A-Za-z0-9_]{1,16}")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file says of one tensor.

    Args:
        shape: Its dimensions.
        dtype: Its type as safetensors writes it, such as "BF16".
        nbytes: How many bytes it takes.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class HeaderTensors:
    """A donor's tensors of which nothing but the headers is at hand.

    Args:
        tensors: The headers, by name.
        where: What they are of, for the message when a tensor is asked for.
    """

    def __init__(self, tensors: Mapping[str, TensorHeader], where: str) -> None:
        self._infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._where = where

    def infos(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        return self._infos

    def slices(self) -> Mapping[str, Any]:
        """Refuse: there is nothing to read from."""
        raise CheckpointError(f"of {self._where} only headers were read; open it with Donor.from_pretrained.")


def read_header(read: Callable[[int, int], bytes], size: int, where: str) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file.

    Args:
        read: Returns bytes of the file, by their start and their number.
        size: The file's.
        where: The file, for messages.

    Returns:
        What it says of each tensor.

    Raises:
        CheckpointError: Not a safetensors file, cut short, or one that claims what cannot be.

    Example:
        >>> text = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
        >>> data = len(text).to_bytes(8, "little") + text + bytes(24)
        >>> read_header(lambda start, count: data[start : start + count], len(data), "example")["a"].num_elements
        6
    """
    head = read(0, min(size, _FIRST_READ))
    length = int.from_bytes(head[:_LENGTH], "little")
    if len(head) < _LENGTH or length > min(size - _LENGTH, _LONGEST):
        raise CheckpointError(
            f"{where} is not a whole safetensors file: its header claims {length:,} bytes, the file has {size:,}. Was "
            "it cut short, or is it a Git LFS pointer?"
        )
    end = _LENGTH + length
    if end > len(head):
        head += read(len(head), end - len(head))
    if len(head) < end:
        raise CheckpointError(f"{where} ends within its header, after {len(head):,} of {end:,} bytes.")
    try:
        content = json.loads(head[_LENGTH:end].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: its header holds {type(content).__name__}, not an object.")
    content.pop("__metadata__", None)
    return _checked(content, size - end, where)


def _checked(content: Mapping[str, Any], data_size: int, where: str) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    places: list[tuple[int, int, str]] = []
    for name, fields in content.items():
        start, end = _offsets(fields, name, where)
        places.append((start, end, name))
        tensors[name] = _tensor(fields, end - start, name, where)
    at = 0
    for start, end, name in sorted(places):
        if start != at or end > data_size:
            raise CheckpointError(
                f"{where}: tensor {name!r} claims bytes {start:,} to {end:,} of {data_size:,}, expected from {at:,}."
            )
        at = end
    if at != data_size:
        raise CheckpointError(f"{where} holds {data_size:,} bytes of tensors, its header accounts for {at:,}.")
    return tensors


def _offsets(fields: Any, name: str, where: str) -> tuple[int, int]:
    found = fields.get("data_offsets") if isinstance(fields, dict) else None
    if not isinstance(found, list) or len(found) != 2 or not all(map(_is_size, found)) or found[0] > found[1]:
        raise CheckpointError(f"{where}: the header does not say where the bytes of tensor {name!r} are.")
    return found[0], found[1]


def _tensor(fields: Mapping[str, Any], nbytes: int, name: str, where: str) -> TensorHeader:
    shape, dtype = fields.get("shape"), fields.get("dtype")
    named = isinstance(dtype, str) and bool(_DTYPE.fullmatch(dtype))
    sized = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and all(map(_is_size, shape))
    if not (named and sized):
        raise CheckpointError(f"{where}: the header does not give a shape and a type of tensor {name!r}.")
    tensor = TensorHeader(tuple(shape or ()), str(dtype), nbytes)
    try:
        bits = 8 * loaded_dtype(tensor.dtype).itemsize
    except CheckpointError:  # the format has types that torch has not, of four bits or six
        bits = 0
    if (bits and 8 * nbytes != bits * tensor.num_elements) or tensor.num_elements > 8 * nbytes:
        raise CheckpointError(
            f"{where}: tensor {name!r} of shape {shape} and type {dtype} cannot take {nbytes:,} bytes."
        )
    return tensor


def _is_size(value: object) -> bool:
    return is_whole(value) and value >= 0
