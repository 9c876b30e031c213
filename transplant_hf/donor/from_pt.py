"""Open a `.pt` file of decoder layers as a donor."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..architecture import open_recipient
from ..errors import CheckpointError, ConfigurationError
from ..layer_map import check_position, paper_position
from ..numeric import is_whole, shown
from ..pt_files import Layout, PtFile, match_layers
from ..sources import HubOptions, Source
from ..storage import read_json
from .companions import locate_with_companions
from .record import DonorRecord, plain_json
from .tensors import TensorInfo, stored_dtype, unpack_mxfp4

METADATA_FILE = "donor_metadata.json"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class PtTensors:
    """The tensors of a donor that is still a `.pt` file."""

    def __init__(self, file: PtFile, layout: Layout) -> None:
        self.path: Path = file.path
        self._file, self._names = file, layout.tensors
        for name in itertools.chain(*self._names.values()):
            file.check_claims(name)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        infos = {}
        for name, stored in self._names.items():
            tensor, packed = self._file.tensors[stored[0]], len(stored) > 1
            dtype = "BF16" if packed else stored_dtype(tensor.dtype, name)
            infos[name] = TensorInfo(_unpacked_shape(tensor.shape) if packed else tensor.shape, dtype)
        return infos

    def slices(self) -> Mapping[str, Any]:
        """Return the tensors, mapped from the file; those in MXFP4 are unpacked as they are read."""
        opened = self._file.open_tensors(itertools.chain(*self._names.values()))
        tensors = {name: [opened[one] for one in stored] for name, stored in self._names.items()}
        return {name: _Unpacked(*parts) if len(parts) > 1 else parts[0] for name, parts in tensors.items()}


def _unpacked_shape(blocks: Sequence[int]) -> tuple[int, int, int]:
    experts, outputs, groups, half = blocks
    return experts, groups * half * 2, outputs


class _Unpacked:
    """A tensor in MXFP4, which becomes bf16 when it is read."""

    dtype = torch.bfloat16

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        self._blocks, self._scales = blocks, scales

    def get_shape(self) -> list[int]:
        """Experts, inputs, outputs."""
        return list(_unpacked_shape(self._blocks.shape))

    def __getitem__(self, index: Any) -> torch.Tensor:
        experts = index if isinstance(index, slice) else slice(None)
        unpacked = unpack_mxfp4(self._blocks[experts], self._scales[experts])
        return unpacked.contiguous() if isinstance(index, slice) else unpacked[index].contiguous()


class MatchedFile(NamedTuple):
    """A `.pt` file whose tensors were matched with the layers of its source model."""

    record: DonorRecord
    store: PtTensors
    position: int  # the best known one
    num_layers: int
    layout: Layout
    recipient: Source
    classes: tuple[str, ...]  # that the file names; none of them was imported or run


def match_pt_file(
    path: str | os.PathLike[str],
    recipient: str | os.PathLike[str],
    metadata: Mapping[str, Any] | str | os.PathLike[str] | None,
    layers: Sequence[int] | None,
    name: str | None,
    revision: str | None,
    hub: HubOptions,
) -> MatchedFile:
    """Open a `.pt` file and find the donor in it; see `Donor.from_pt`."""
    file = PtFile(path)
    recorded = _metadata(metadata, file.path)
    reference = Path(recipient).expanduser()
    source = locate_with_companions(
        str(reference.absolute().parent) if reference.is_file() else os.fspath(recipient), revision=revision, hub=hub
    )
    model = open_recipient(source.reference, source.revision, hub)
    anatomy = model.anatomy()
    layout = match_layers(file.tensors, anatomy, _recorded_layers(recorded, file), layers, str(file.path))
    record = DonorRecord(
        model_type=anatomy.config.model_type,
        source_config=dict(model.fields),
        layer_indices=layout.layers,
        source_id=source.reference,
        source_revision=source.revision,
        name=name or _recorded_name(recorded),
        metadata=recorded,
    )
    position = _recorded_position(recorded, anatomy.num_layers, file.path)
    return MatchedFile(
        record, PtTensors(file, layout), position, anatomy.num_layers, layout, source, tuple(file.classes)
    )


def _metadata(metadata: Mapping[str, Any] | str | os.PathLike[str] | None, file: Path) -> dict[str, Any]:
    if isinstance(metadata, Mapping):
        return plain_json(metadata, "the donor's metadata")
    if metadata is not None:
        return read_json(Path(metadata).expanduser(), "the donor's metadata")
    beside = file.parent / METADATA_FILE
    return read_json(beside, "the donor's metadata") if beside.exists() else {}


def _recorded_layers(recorded: Mapping[str, Any], file: PtFile) -> list[int] | None:
    """The layer indices that the author recorded, beside the file or in it."""
    inside = (value for name, value in file.values.items() if name.rpartition(".")[2] == "layer_indices")
    layers = recorded.get("layer_indices", next(inside, None))
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(map(is_whole, layers)):
        raise CheckpointError(f"{file.path}: layer_indices must be a list of whole numbers, got {shown(layers)}.")
    return sorted(layers)


def _recorded_position(recorded: Mapping[str, Any], num_layers: int, file: Path) -> int:
    """The author's rule: the best known position, else the first quarter."""
    best = next((recorded[key] for key in ("best_position", "position") if recorded.get(key) is not None), None)
    if best is None:
        return paper_position(num_layers)
    try:
        return check_position(best, num_layers)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{file}: its metadata records a position that cannot be used: {error} Pass metadata= (--metadata) without "
            "it, and the position when saving (--position)."
        ) from error


def _recorded_name(recorded: Mapping[str, Any]) -> str | None:
    """The author's name of the donor; a donor without a name is called after the folder it is saved to."""
    name = recorded.get("name")
    return _NOT_IN_NAMES.sub("-", name).strip("-.") or None if isinstance(name, str) else None
