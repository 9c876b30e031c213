"""A donor's tensors: described by headers, read when they are needed."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..storage import read_json

DONOR_FILE = "donor.safetensors"
DONOR_INDEX = "donor.safetensors.index.json"
_NAME = re.compile(r"layers\.(0|[1-9]\d{0,8})\.(.+)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# Data types by the names that safetensors uses, and back.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def stored_dtype(dtype: torch.dtype, name: str) -> str:
    """Return safetensors' name of a data type."""
    if dtype not in _NAMES:
        raise CheckpointError(f"donor tensor {name!r} has type {dtype}, which safetensors cannot store.")
    return _NAMES[dtype]


def loaded_dtype(stored: str) -> torch.dtype:
    """Return the data type with this name in safetensors."""
    if stored not in _DTYPES:
        raise CheckpointError(f"{stored!r} is not a data type of torch.")
    return _DTYPES[stored]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The header of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    file: Path | None = None  # `None` for a tensor in memory
    name_in_file: str | None = None

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


class TensorStore(Protocol):
    """Named tensors that are read on demand."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return the header of every tensor, without reading any."""
        ...

    def slices(self) -> Mapping[str, Any]:
        """Return a lazy tensor for each name, read by `[...]`, from newly opened files."""
        ...


def layer_of(name: str) -> tuple[int, str]:
    """Split `layers.{i}.{name inside the layer}`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"donor tensor {name!r} is not named layers.<number>.<name inside the layer>.")
    return int(match[1]), match[2]


class MemoryTensors:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return the header of every tensor."""
        return {
            name: TensorInfo(tuple(tensor.shape), stored_dtype(tensor.dtype, name))
            for name, tensor in self._tensors.items()
        }

    def slices(self) -> Mapping[str, Any]:
        """Return the tensors themselves."""
        return self._tensors


class FileTensors:
    """Tensors in safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._infos: dict[str, TensorInfo] = {}
        for path in files:
            for name, part in slices_of(path).items():
                if name in self._infos:
                    raise CheckpointError(f"tensor {name!r} is in both {self._infos[name].file} and {path}.")
                self._infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), path, name)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return the header of every tensor."""
        return self._infos

    def slices(self) -> Mapping[str, Any]:
        """Map the files again: a donor that is used twice must not share memory with itself."""
        return {name: part for path in self.files for name, part in slices_of(path).items()}


def slices_of(path: Path) -> dict[str, Any]:
    """Open a safetensors file by its header: a lazy tensor for each name."""
    try:
        file = safe_open(path, framework="pt", device="cpu")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file, not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"weights are missing: {path}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Is it truncated, or a Git LFS pointer?"
        ) from error


def open_donor_files(folder: Path) -> FileTensors:
    """Open a donor's weight files, one or sharded, by their headers."""
    index = folder / DONOR_INDEX
    if not index.exists():
        if not (folder / DONOR_FILE).exists():
            raise CheckpointError(f"no donor weights in {folder}: neither {DONOR_FILE} nor {DONOR_INDEX}.")
        return FileTensors([folder / DONOR_FILE])
    weight_map = read_shard_index(index)
    store = FileTensors([folder / name for name in sorted(set(weight_map.values()))])
    shards = {path.name: [name for name, info in store.infos().items() if info.file == path] for path in store.files}
    check_shards(weight_map, shards, str(index))
    return store


def read_shard_index(path: Path, where: str | None = None) -> dict[str, str]:
    """Read the index of a sharded checkpoint: which file holds which tensor."""
    where, suffix = where or str(path), Path(path.name.removesuffix(".index.json")).suffix
    weight_map = read_json(path, "the shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map.")
    try:
        return {tensor: safe_name(str(file), suffix) for tensor, file in weight_map.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{where} is malformed: {error}") from error


def check_shards(weight_map: Mapping[str, str], shards: Mapping[str, Iterable[str]], where: str) -> None:
    """Compare a shard index with the tensors that the shards hold."""
    names = {name: set(tensors) for name, tensors in shards.items()}
    count = Counter(tensor for tensors in names.values() for tensor in tensors)
    for wrong, how in (
        ({tensor for tensor in count if count[tensor] > 1}, "are in two shards"),
        (set(weight_map) ^ set(count), "are only in the index or only in a shard"),
        ({tensor for tensor, file in weight_map.items() if tensor not in names.get(file, ())}, "are in another shard"),
    ):
        if wrong:
            raise CheckpointError(f"{where} and its shards disagree: {len(wrong)} tensors {how}, first {min(wrong)!r}.")


def safe_name(name: str, suffix: str = ".safetensors") -> str:
    """Return a weight file's name if it cannot lead out of its folder."""
    if not _FILE_NAME.fullmatch(name) or not name.endswith(suffix):
        raise CheckpointError(f"{name!r} is not a plain {suffix} file name; weight files lie beside their index.")
    return name


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Unpack the weights of experts in MXFP4: `[experts, inputs, outputs]` in bfloat16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = blocks.new_empty(len(blocks), 2 * blocks.shape[2:].numel(), blocks.shape[1], dtype=torch.bfloat16)
    for number, expert in enumerate(made):  # all experts at once take several times their memory
        expert.copy_(convert_moe_packed_tensors(blocks[number : number + 1], scales[number : number + 1])[0])
    return made
