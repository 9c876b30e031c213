"""Read a written donor back, and compare it with what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ..donor.stream import bytes_of, pieces, read_ahead, size_of
from ..donor.tensors import TensorInfo, TensorStore
from ..errors import CheckpointError
from ..storage import fill

__all__ = ["compare_tensors"]

_PROGRESS_FROM = 1 << 28


def compare_tensors(source: TensorStore, written: TensorStore, source_name: str, written_name: str) -> None:
    """Compare a donor's files with the tensors they were written from, bit for bit.

    The files are read anew, through their own headers and without mapping them, so that memory does not grow.

    Args:
        source: Where the tensors came from.
        written: Where they went: safetensors files, by their headers.
        source_name: For messages.
        written_name: The same.

    Raises:
        CheckpointError: Names, shapes, types or any bit differ.
    """
    wanted, found = source.infos(), written.infos()
    if set(wanted) != set(found):
        strays = sorted(set(wanted) ^ set(found))
        raise CheckpointError(f"{written_name} and {source_name} hold other tensors, first {strays[0]!r}.")
    parts = source.slices()
    total = sum(map(size_of, wanted.values()))
    with tqdm(total=total, desc="Reading back", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM) as progress:
        for path in sorted({info.file for info in found.values() if info.file is not None}):
            inside = {name: wanted[name] for name, info in found.items() if info.file == path}
            for name, info in inside.items():
                if (info.shape, info.dtype) != (found[name].shape, found[name].dtype):
                    raise CheckpointError(
                        f"{written_name}: {name} became {found[name].dtype} {list(found[name].shape)}."
                    )
            _compare_file(path, inside, parts, f"{written_name}/{path.name}", source_name, progress)


def _compare_file(
    path: Path,
    infos: Mapping[str, TensorInfo],
    parts: Mapping[str, Any],
    written_name: str,
    source_name: str,
    progress: tqdm[Any],
) -> None:
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, info in infos.items():
            file.seek(8 + length + header[name]["data_offsets"][0])
            found = bytearray()
            for expected in read_ahead(map(bytes_of, pieces(info, parts[name]))):
                found = found if len(found) >= len(expected) else bytearray(len(expected))
                if not _next_are(file, expected, memoryview(found)[: len(expected)]):
                    raise CheckpointError(
                        f"{written_name}: {name} was read back with other bits than {source_name} has. The disk or "
                        "memory may be faulty; nothing was kept."
                    )
                progress.update(len(expected))


def _next_are(file: BinaryIO, expected: memoryview, found: memoryview) -> bool:
    """Whether the next bytes of a file are these; `found` receives them."""
    if not fill(file, found):
        return False
    words = len(found) - len(found) % 8
    one, other = np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8)
    same_words = np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64))
    return same_words and np.array_equal(one[words:], other[words:])
