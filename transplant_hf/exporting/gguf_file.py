"""Read GGUF files, and write them with other metadata and tensors.

The package gguf has a reader and a writer too. They hold a Python object for every token of the vocabulary, several for
some: more memory than a small model. Here the vocabulary is copied as the bytes that it is.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..display import progress_bar
from ..errors import CheckpointError, ConfigurationError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)  # which are the same in the byte order that is read here
# Types of values, by their number in the file: those of struct, then a boolean, a string and an array.
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_MOST_READ = 4096  # values of an array; longer ones belong to the vocabulary
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file, read or to be written."""

    name: str
    type: Any  # a `GGMLQuantizationType`
    shape: tuple[int, ...]  # in the order of torch
    read: Callable[[], memoryview]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclasses.dataclass(frozen=True)
class _Field:
    """A metadata value: its bytes in the file, with the key, and what they say; a long array is counted only."""

    packed: slice
    value: Any
    count: int = 1


class GgufFile:
    """A GGUF file, mapped into memory: tensors are read when they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields: dict[str, _Field] = {}
        self._tensors: list[GgufTensor] = []
        try:
            with path.open("rb") as file:
                self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._read(_Cursor(self._bytes))
        except (ValueError, LookupError, OverflowError, struct.error) as error:
            raise CheckpointError(f"{path} is not a whole GGUF file ({error}). Is it truncated?") from error
        if (self.value("split.count") or 1) > 1:
            raise ConfigurationError(
                f"{path} is one of {self.value('split.count')} parts of a model. Join them with llama-gguf-split "
                "--merge of llama.cpp, and name that file."
            )
        self.architecture = str(self.value("general.architecture"))
        self.outer: list[GgufTensor] = []
        blocks: dict[int, list[GgufTensor]] = {}
        for tensor in self._tensors:
            found = _BLOCK.fullmatch(tensor.name)
            if found is None:
                self.outer.append(tensor)
            else:
                blocks.setdefault(int(found[1]), []).append(dataclasses.replace(tensor, name=found[2]))
        self.blocks = [blocks[number] for number in sorted(blocks)]

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != _MAGIC or cursor.number("I") not in _VERSIONS:
            raise ValueError(f"it does not begin with {_MAGIC.decode()} and one of the versions {_VERSIONS}")
        num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
        for _ in range(num_fields):
            start, key = cursor.at, cursor.take(cursor.number("Q")).decode()
            value, count = cursor.value(cursor.number("I"))
            self._fields[key] = _Field(slice(start, cursor.at), value, count)
        infos = [cursor.tensor_info() for _ in range(num_tensors)]
        self.alignment = int(self.value("general.alignment") or 32)
        start = cursor.at + -cursor.at % self.alignment
        self._tensors = [self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos]

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        from gguf import GGMLQuantizationType

        tensor = GgufTensor(name, GGMLQuantizationType(kind), shape, lambda: self._bytes[start : start + tensor.nbytes])
        if start + tensor.nbytes > len(self._bytes):
            raise ValueError(f"{name} ends behind the end of the file")
        return tensor

    def value(self, key: str) -> Any:
        """Return the value of a metadata key; `None` where there is none, and for a long array."""
        return self._fields[key].value if key in self._fields else None

    def count(self, key: str) -> int:
        """Return the length of an array in the metadata; 0 where there is none."""
        return self._fields[key].count if key in self._fields else 0

    def own(self, name: str) -> Any:
        """Return the value of a metadata key of the architecture, such as "block_count"."""
        return self.value(f"{self.architecture}.{name}")

    def own_names(self) -> list[str]:
        """Return the names of the architecture's metadata keys."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]

    def packed_fields(self, without: Callable[[str], bool]) -> list[bytes]:
        """Return the metadata as the bytes that it is in the file, without some keys."""
        return [self._bytes[field.packed].tobytes() for key, field in self._fields.items() if not without(key)]


class _Cursor:
    """A place in the bytes of a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it ends in its header")
        return bytes(self.data[self.at - length : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def value(self, kind: int) -> tuple[Any, int]:
        """Return a value, strings as text, and its length if it is an array."""
        if kind == _STRING:
            return self.take(self.number("Q")).decode(errors="replace"), 1
        if kind != _ARRAY:
            return self.number(_CODES[kind]), 1
        inner, count = self.number("I"), self.number("Q")
        if inner in _CODES:
            packed = self.take(count * struct.calcsize(f"<{_CODES[inner]}"))
            return (list(struct.unpack(f"<{count}{_CODES[inner]}", packed)) if count <= _MOST_READ else None), count
        if inner != _STRING:
            raise ValueError("it holds an array of arrays")
        for _ in range(count):
            self.take(self.number("Q"))
        return None, count

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name of a tensor, its shape, its type, and where it begins among the tensors."""
        name = self.take(self.number("Q")).decode()
        shape = [self.number("Q") for _ in range(self.number("I"))]
        return name, tuple(reversed(shape)), self.number("I"), self.number("Q")


def in_block(number: int, tensor: GgufTensor) -> GgufTensor:
    """Return a block's tensor under the name that it has in the file."""
    return dataclasses.replace(tensor, name=f"blk.{number}.{tensor.name}")


def write_gguf(
    path: Path,
    source: GgufFile,
    changed: Mapping[str, int | Sequence[Any]],
    tensors: Sequence[GgufTensor],
    without: Callable[[str], bool] = lambda key: False,
) -> None:
    """Write a file with the source's metadata, some of it changed or left out; one tensor is in memory at a time."""
    fields = source.packed_fields(lambda key: key in changed or without(key))
    fields += [_text(key) + _packed(value) for key, value in changed.items()]
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(fields)) + b"".join(fields))
    offset = 0
    for tensor in tensors:
        numbers = (len(tensor.shape), *reversed(tensor.shape), tensor.type, offset)
        header += _text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}QIQ", *numbers)
        offset += tensor.nbytes + -tensor.nbytes % source.alignment
    with path.open("wb") as file, progress_bar(offset, "Writing weights") as bar:
        file.write(header + bytes(-len(header) % source.alignment))
        for tensor in tensors:
            file.write(tensor.read())
            file.write(bytes(-tensor.nbytes % source.alignment))
            bar.update(tensor.nbytes)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _packed(value: int | Sequence[Any]) -> bytes:
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value[0], bool):
        return struct.pack(f"<IIQ{len(value)}?", _ARRAY, _BOOL, len(value), *value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))


def check_written(path: Path, tensors: Sequence[GgufTensor]) -> None:
    """Read a file back, and compare every tensor with what was to be written, byte for byte."""
    file = GgufFile(path)
    written = file.outer + [in_block(number, tensor) for number, block in enumerate(file.blocks) for tensor in block]
    found = {tensor.name: tensor for tensor in written}
    with progress_bar(sum(tensor.nbytes for tensor in tensors), "Comparing weights") as bar:
        for tensor in tensors:
            other = found.pop(tensor.name, None)
            same = other is not None and (other.type, other.shape) == (tensor.type, tensor.shape)
            if other is None or not same or other.read() != tensor.read():
                raise CheckpointError(f"{tensor.name} of the written file differs. Nothing was kept.")
            bar.update(tensor.nbytes)
