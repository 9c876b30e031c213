"""Write a planned checkpoint a piece at a time, and read back what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from ..display import parse_size
from ..donor.dtypes import loaded_dtype
from ..donor.record import FileStamp
from ..donor.stream import PIECE, bytes_of, pieces, size_of, stream_file
from ..donor.tensors import FileTensors
from ..errors import CheckpointError
from ..numeric import is_finite
from ..storage import sha256_of, write_json
from .plan import PlannedTensor

__all__ = ["WEIGHTS_INDEX", "write_weights"]

WEIGHTS_INDEX = "model.safetensors.index.json"
_PROGRESS_FROM = 1 << 28


def write_weights(
    folder: Path, tensors: Mapping[str, PlannedTensor], max_shard_size: int | str
) -> dict[str, FileStamp]:
    """Write `model.safetensors`, or shards and their index.

    Every byte is read once, looked at, cast where that was planned, hashed and written, in pieces of about 4 MiB. Each
    file is read back and compared while the next one is written.

    Args:
        folder: Where to.
        tensors: What to write.
        max_shard_size: Largest file, in bytes or as in "5GB"; no tensor is split.

    Returns:
        sha256 and size of every weight file.

    Raises:
        CheckpointError: A tensor that is not finite, or a file that was read back otherwise than it was written.
    """
    infos = {name: tensor.written for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(info.shape, dtype=loaded_dtype(info.dtype), device="meta") for name, info in infos.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
    )
    stamps: dict[str, FileStamp] = {}
    checks: list[Future[None]] = []
    total = sum(map(size_of, infos.values()))
    bar = tqdm(total=total, desc="Writing checkpoint", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM)
    with bar, ThreadPoolExecutor(1, "read-back") as pool:
        for filename, names in sorted(split.filename_to_tensors.items()):
            path = folder / filename
            inside = {name: tensors[name] for name in names}
            digest = _write_file(path, inside, bar)
            stamps[filename] = FileStamp(digest, path.stat().st_size)
            checks.append(pool.submit(_read_back, path, inside, digest))
        for check in checks:
            check.result()
    if split.is_sharded:
        write_json(folder / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return stamps


def _write_file(path: Path, tensors: Mapping[str, PlannedTensor], bar: tqdm[Any]) -> str:
    """Write one file and return its sha256."""
    # Widest types first, so that every tensor begins at a multiple of its type's size.
    names = sorted(tensors, key=lambda name: -loaded_dtype(tensors[name].dtype).itemsize)
    written = {name: tensors[name].written for name in names}
    return stream_file(path, written, _bytes_in_order(tensors[name] for name in names), bar)


def _bytes_in_order(tensors: Iterator[PlannedTensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        dtype = loaded_dtype(tensor.dtype)
        for piece in pieces(tensor.source.info, tensor.source.part):
            # A single expert may be far larger than a piece; a cast must not make a copy of that size.
            for run in piece.reshape(-1).split(PIECE // max(piece.element_size(), dtype.itemsize)):
                if not is_finite(run):
                    raise CheckpointError(
                        f"{tensor.source.origin} holds NaN or infinity; nothing is exported. Take a checkpoint from "
                        "before its training diverged."
                    )
                cast = run.to(dtype)
                if cast is not run and not is_finite(cast):
                    raise CheckpointError(
                        f"{tensor.source.origin} holds numbers that are too large for {dtype}; nothing is exported. "
                        "Export in bfloat16 or float32."
                    )
                yield bytes_of(cast)


def _read_back(path: Path, tensors: Mapping[str, PlannedTensor], digest: str) -> None:
    found = FileTensors([path]).infos()
    wanted = {name: (tensor.written.shape, tensor.dtype) for name, tensor in tensors.items()}
    if {name: (info.shape, info.dtype) for name, info in found.items()} != wanted or sha256_of(path) != digest:
        raise CheckpointError(
            f"{path.name} was read back with other bits than were written. The disk or memory may be faulty; nothing "
            "was kept."
        )
