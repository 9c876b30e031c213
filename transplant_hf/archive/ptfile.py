"""`PtFile`: the tensors of a `.pt` file, described at once and read a piece at a time."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from ..storage import fill
from .container import Region, Stamp, open_container
from .descriptions import TensorRef
from .tree import Content, flatten

__all__ = ["PtFile", "PtTensor"]

_STEP = 1 << 22
_SPARSEST = 8  # bytes that are read for each that a view shows


class PtFile:
    """A file that `torch.save` wrote, of any size.

    Opening it reads descriptions only. Bytes are read on demand, and a storage's checksum is compared before anything
    is taken from it.

    Args:
        path: The file.

    Raises:
        CheckpointError: Not such a file, cut short, compressed, or inconsistent.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "layers.pt"
        >>> torch.save([{"weight": torch.ones(2, 3)}], path)
        >>> PtFile(path)["0.weight"][1:]
        tensor([[1., 1., 1.]])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        container = open_container(self.path)
        self._storages = container.storages
        self._content: Content = flatten(container.content, str(self.path))
        self._stamp = container.stamp
        self._checked: set[str] = set()

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Descriptions of all tensors, by dotted name."""
        return self._content.tensors

    @property
    def values(self) -> Mapping[str, Any]:
        """Plain values beside the tensors, by dotted name."""
        return self._content.values

    @property
    def classes(self) -> set[str]:
        """Classes of pickled objects; nothing of them was run."""
        return self._content.classes

    def __getitem__(self, name: str) -> PtTensor:
        return PtTensor(self, name, self.tensors[name])

    def region(self, name: str) -> Region:
        """Return where a tensor's storage lies, once what the tensor claims has been compared with it.

        Raises:
            CheckpointError: The storage is missing, or smaller than the tensor.
        """
        ref = self.tensors[name]
        storage = self._storages.get(ref.storage.key)
        if storage is None:
            raise CheckpointError(
                f"{self.path}: the bytes of tensor {name!r} are missing (storage {ref.storage.key[:80]!r}). Get the "
                "file again from its author."
            )
        claimed = ref.storage.num_elements * ref.storage.dtype.itemsize
        if claimed != storage.size:
            raise CheckpointError(
                f"{self.path}: the storage of tensor {name!r} claims {claimed} bytes, the file holds {storage.size}. "
                "Get it again from its author."
            )
        last = (ref.last_element + 1) * ref.dtype.itemsize if ref.num_elements else 0
        if ref.nbytes > storage.size or last > storage.size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(ref.shape)} claims {max(ref.nbytes, last)} bytes, its "
                f"storage holds {storage.size}. An expanded tensor must be saved with .contiguous()."
            )
        return storage

    def check(self, name: str) -> Region:
        """Compare the checksum of a tensor's storage with its bytes, once.

        Raises:
            CheckpointError: They differ.
        """
        region, key = self.region(name), self.tensors[name].storage.key
        if key not in self._checked and region.crc is not None:
            for _ in self.stream(name, 0, region.size, _STEP):
                pass
        return region

    def stream(self, name: str, start: int, size: int, step: int) -> Iterator[torch.Tensor]:
        """Read a run of bytes of a tensor's storage, a piece at a time, checksum included.

        Args:
            name: The tensor.
            start: Where the run begins in the storage, in bytes.
            size: How many bytes it has.
            step: How many to read at once.

        Yields:
            `[step]` uint8; the memory of a piece is used again for the one after the next.

        Raises:
            CheckpointError: The checksum differs, at the latest after the last piece.
        """
        region, key = self.region(name), self.tensors[name].storage.key
        whole = (start, size) == (0, region.size)
        on_the_way = whole and key not in self._checked and region.crc is not None
        if not on_the_way:
            self.check(name)
        buffers = [torch.empty(min(step, size), dtype=torch.uint8) for _ in range(2)]
        crc = 0
        with self._opened() as file:
            for number, at in enumerate(range(0, size, step)):
                piece = buffers[number % 2][: min(step, size - at)]
                self._fill(file, region.start + start + at, piece.numpy().data)
                crc = zlib.crc32(piece.numpy().data, crc) if on_the_way else 0
                yield piece
        if not on_the_way:
            return
        if crc != region.crc:
            raise CheckpointError(
                f"{self.path}: the bytes of tensor {name!r} do not have the checksum recorded for them: the file "
                "was changed or damaged. Get it again from its author."
            )
        self._checked.add(key)

    def read(self, start: int, size: int) -> torch.Tensor:
        """Read bytes of the file.

        Returns:
            `[size]` uint8.

        Raises:
            CheckpointError: The file was changed since it was opened.
        """
        data = torch.empty(size, dtype=torch.uint8)
        with self._opened() as file:
            self._fill(file, start, data.numpy().data)
        return data

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Open the file again, if it is still the one whose description was read."""
        try:
            with self.path.open("rb", buffering=0) as file:
                if Stamp.of(file) != self._stamp:
                    raise CheckpointError(f"{self.path} was changed or replaced after it was opened. Open it again.")
                yield file
        except OSError as error:
            raise CheckpointError(f"{self.path} can no longer be read: {error}. Open it again.") from error

    def _fill(self, file: BinaryIO, start: int, view: memoryview) -> None:
        file.seek(start)
        if not fill(file, view):
            raise CheckpointError(f"{self.path} became shorter while it was read. Open it again.")


class PtTensor:
    """A tensor of a `.pt` file; `[...]`, or a slice of the first dimension, reads it."""

    def __init__(self, file: PtFile, name: str, ref: TensorRef) -> None:
        self._file, self._name, self._ref = file, name, ref

    @property
    def path(self) -> Path:
        """The file it is in."""
        return self._file.path

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self._ref.dtype

    def get_shape(self) -> list[int]:
        """Its dimensions, as safetensors' slices tell them."""
        return list(self._ref.shape)

    def in_order(self, size: int) -> Iterator[torch.Tensor]:
        """Read every element in order, whatever the dimensions.

        Args:
            size: The most bytes to read at once.

        Yields:
            `[elements]`, as far as the elements lie in order in the file; else some rows at a time, and where these lie
            all over the storage, the whole of it in memory. The memory of a piece is used again for the one after the
            next.
        """
        ref = self._ref
        if not ref.num_elements or not ref.is_contiguous:
            region = self._file.check(self._name)
            yield from self._strided_rows(region, size) if ref.num_elements else ()
            return
        step = size - size % ref.dtype.itemsize
        for piece in self._file.stream(self._name, ref.offset * ref.dtype.itemsize, ref.nbytes, step):
            yield piece.view(ref.dtype)

    def _strided_rows(self, region: Region, size: int) -> Iterator[torch.Tensor]:
        length = self._ref.shape[0]
        rows = min(length, max(1, size // max(1, self._ref.nbytes // length)))
        if self._span(rows) * (length // rows) > 2 * self._span(length):
            # Every few rows lie all over the storage, as in a transposed matrix: it is read once, as a whole.
            yield from self._gathered(region, 0, length).split(rows)
            return
        for start in range(0, length, rows):
            yield self._gathered(region, start, min(start + rows, length))

    def __getitem__(self, index: Any) -> torch.Tensor:
        region, ref = self._file.check(self._name), self._ref
        if not ref.num_elements:
            return torch.empty(ref.shape, dtype=ref.dtype)[index]
        read = self._rows if ref.is_contiguous else self._gathered
        if isinstance(index, slice) and ref.shape and index.step in (None, 1):
            start, stop, _ = index.indices(ref.shape[0])
            return read(region, start, max(start, stop))
        whole = read(region, 0, ref.shape[0] if ref.shape else 1)
        return whole[index] if ref.is_contiguous else _in_order(whole[index])

    def _rows(self, region: Region, start: int, stop: int) -> torch.Tensor:
        ref = self._ref
        row = ref.nbytes // ref.shape[0] if ref.shape else ref.nbytes
        first = region.start + ref.offset * ref.dtype.itemsize + start * row
        if stop == start:
            return torch.empty((0, *ref.shape[1:]), dtype=ref.dtype)
        data = self._file.read(first, (stop - start) * row)
        return data.view(ref.dtype).reshape((stop - start, *ref.shape[1:]) if ref.shape else ())

    def _span(self, rows: int) -> int:
        """How many elements of the storage lie between the first and the last of some rows, these two included."""
        ref = self._ref
        return 1 + sum((n - 1) * step for n, step in zip((rows, *ref.shape[1:]), ref.stride, strict=True))

    def _gathered(self, region: Region, start: int, stop: int) -> torch.Tensor:
        """Read rows whose elements are not in order; never by mapping, which ends the process if the file is cut."""
        ref, width = self._ref, self._ref.dtype.itemsize
        shape = (stop - start, *ref.shape[1:])
        if stop == start:
            return torch.empty(shape, dtype=ref.dtype)
        span = self._span(stop - start) * width
        if span <= _SPARSEST * math.prod(shape) * width + _STEP:
            first = region.start + (ref.offset + start * ref.stride[0]) * width
            return _in_order(self._file.read(first, span).view(ref.dtype).as_strided(shape, ref.stride))
        if stop - start > 1:
            return torch.cat([self._gathered(region, row, row + 1) for row in range(start, stop)])
        raise CheckpointError(
            f"{self.path}: tensor {self._name!r} of shape {list(ref.shape)} is spread over {span} bytes of its "
            "storage. Such a view must be saved with .contiguous()."
        )


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view; `contiguous` would keep the odd strides of one that shows a single element."""
    return tensor.clone(memory_format=torch.contiguous_format)
