"""Write safetensors files a piece at a time, so that memory does not grow with the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ..archive import PtTensor
from ..errors import CheckpointError
from ..numeric import is_finite
from .dtypes import loaded_dtype
from .tensors import TensorInfo

__all__ = ["PIECE", "bytes_of", "pieces", "read_ahead", "size_of", "stream_file", "write_safetensors"]

# Small enough for memory that is used again and stays in the processor's cache.
PIECE = 1 << 22
_ALIGNMENT = 8
_T = TypeVar("_T")


def size_of(info: TensorInfo) -> int:
    """Return how many bytes a tensor takes in a file."""
    return info.num_elements * loaded_dtype(info.dtype).itemsize


def pieces(info: TensorInfo, part: Any) -> Iterator[torch.Tensor]:
    """Read a lazy tensor a piece at a time.

    Yields:
        Contiguous parts, in order, of about 4 MiB; at least one entry of the first dimension where no smaller part
        can be read. The memory of a piece may be used again for the one after the next.
    """
    if isinstance(part, PtTensor) and size_of(info) > PIECE:
        yield from part.in_order(PIECE)
        return
    if not info.shape or size_of(info) <= PIECE:
        yield part[...].detach().to("cpu").contiguous()
        return
    rows = max(1, PIECE // (size_of(info) // info.shape[0]))
    for start in range(0, info.shape[0], rows):
        yield part[start : min(start + rows, info.shape[0])].detach().to("cpu").contiguous()


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], parts: Mapping[str, Any], progress: tqdm[Any]
) -> str:
    """Write tensors into one file.

    Args:
        path: The file.
        infos: What they are.
        parts: Lazy tensors of the same names.
        progress: Told of every byte.

    Returns:
        The file's sha256, in hexadecimal.

    Raises:
        CheckpointError: A tensor that is not finite.
    """
    names = sorted(infos, key=lambda name: (-loaded_dtype(infos[name].dtype).itemsize, name))
    return stream_file(path, {name: infos[name] for name in names}, _checked_bytes(infos, parts, names), progress)


def stream_file(path: Path, infos: Mapping[str, TensorInfo], data: Iterator[memoryview], progress: tqdm[Any]) -> str:
    """Write a safetensors file whose bytes come one piece after another.

    Args:
        path: The file.
        infos: Its tensors in order, widest types first, so that each begins at a multiple of its type's size.
        data: Their bytes in that order; made beside the writing.
        progress: Told of every byte.

    Returns:
        The file's sha256, in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1, "hash") as hashing:
        header = _header(infos)
        digest.update(header)
        file.write(header)
        for piece in read_ahead(data):
            hashed = hashing.submit(digest.update, piece)
            file.write(piece)
            hashed.result()
            progress.update(len(piece))
    return digest.hexdigest()


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, info in infos.items():
        end = start + size_of(info)
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _checked_bytes(infos: Mapping[str, TensorInfo], parts: Mapping[str, Any], names: list[str]) -> Iterator[memoryview]:
    for name in names:
        for piece in pieces(infos[name], parts[name]):
            if not is_finite(piece):
                where = f" in {parts[name].path}" if isinstance(parts[name], PtTensor) else ""
                raise CheckpointError(
                    f"donor tensor {name!r}{where} holds NaN or infinity; it is not saved. Take a checkpoint from "
                    "before its training diverged."
                )
            yield bytes_of(piece)


def bytes_of(piece: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's memory."""
    flat = piece.reshape(-1)
    if flat.numel() == 1:  # a single element may keep the odd stride of the view it was taken from
        flat = flat.clone(memory_format=torch.contiguous_format)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def read_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Have the next item made while the present one is used: reading and checking run beside writing and hashing."""
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
