"""Open a `.pt` file of decoder layers as a donor."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..architecture import Anatomy, native_class
from ..archive import PtFile
from ..config import TransplantConfig
from ..errors import CheckpointError, ConfigurationError
from ..layer_map import check_position
from ..layouts import Layout, match_layers
from ..numeric import is_whole, shown
from ..sources import HubOptions, Source, reading
from ..storage import read_json
from .companions import locate_with_companions
from .pt_tensors import PtTensors
from .record import DonorRecord, plain_json

__all__ = ["METADATA_FILE", "OpenedPt", "open_pt"]

METADATA_FILE = "donor_metadata.json"
_UNPLAIN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclasses.dataclass(frozen=True)
class OpenedPt:
    """A `.pt` file understood.

    Args:
        record: What is known of the donor.
        store: Its tensors.
        position: The best known position, else the first quarter of the recipient.
        num_layers: L, the recipient's layers.
        layout: Where its tensors are in the file.
        recipient: The source model's configuration and tokenizer.
        classes: Pickled classes in the file, of which nothing was run.
    """

    record: DonorRecord
    store: PtTensors
    position: int
    num_layers: int
    layout: Layout
    recipient: Source
    classes: tuple[str, ...]


def open_pt(
    path: str | os.PathLike[str],
    recipient: str | os.PathLike[str],
    metadata: Mapping[str, Any] | str | os.PathLike[str] | None,
    layers: Sequence[int] | None,
    name: str | None,
    revision: str | None,
    hub: HubOptions,
) -> OpenedPt:
    """Open a `.pt` file; see `Donor.from_pt`."""
    file = PtFile(path)
    known = _metadata(metadata, file)
    source, fields, config = _source_model(recipient, revision, hub)
    with reading("the model class", str(source)):
        anatomy = Anatomy(*native_class(AutoModelForCausalLM, config, str(source)), f"recipient {source}")
    layout = match_layers(file.tensors, anatomy, _indices(known, file), layers, str(file.path))
    record = DonorRecord(
        model_type=config.model_type,
        source_config=fields,
        layer_indices=layout.layers,
        source_id=source.reference,
        source_revision=source.revision,
        name=name or _name(known),
        metadata=known,
    )
    position = _position(known, anatomy.num_layers, str(file.path))
    return OpenedPt(
        record, PtTensors(file, layout), position, anatomy.num_layers, layout, source, tuple(sorted(file.classes))
    )


def _source_model(
    recipient: str | os.PathLike[str], revision: str | None, hub: HubOptions
) -> tuple[Source, dict[str, Any], PreTrainedConfig]:
    reference = os.fspath(recipient)
    if Path(reference).expanduser().is_file():
        reference = str(Path(reference).expanduser().absolute().parent)
    source = locate_with_companions(reference, revision=revision, hub=hub)
    fields = read_json(source.folder / "config.json", "the recipient's config.json")
    if fields.get("model_type") == TransplantConfig.model_type:
        raise ConfigurationError(
            f"recipient {source} is itself a transplant; name the model that the layers came from."
        )
    with reading("the configuration", str(source)):
        try:
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        except ValueError as error:
            raise ConfigurationError(f"recipient {source} is no model that can be loaded: {error}") from error
    return source, fields, config


def _metadata(given: Mapping[str, Any] | str | os.PathLike[str] | None, file: PtFile) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return plain_json(given, "the donor's metadata")
    if given is not None:
        return read_json(Path(given).expanduser(), "the donor's metadata")
    beside = file.path.parent / METADATA_FILE
    return read_json(beside, "the donor's metadata") if beside.exists() else {}


def _indices(known: Mapping[str, Any], file: PtFile) -> list[int] | None:
    """The layer indices that the author recorded, beside the file or in it."""
    inside = (value for name, value in file.values.items() if name.rpartition(".")[2] == "layer_indices")
    found = known.get("layer_indices", next(inside, None))
    if found is None:
        return None
    if not isinstance(found, list) or not all(map(is_whole, found)):
        raise CheckpointError(f"{file.path}: layer_indices must be a list of whole numbers, found {shown(found)}.")
    return sorted(found)


def _position(known: Mapping[str, Any], num_layers: int, what: str) -> int:
    """The author's rule: the best known position, else the first quarter."""
    best = next((known[key] for key in ("best_position", "position") if known.get(key) is not None), None)
    if best is None:
        return max(1, num_layers // 4)
    try:
        return check_position(best, num_layers)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{what}: its metadata records a position that cannot be used: {error} Pass metadata= without it, and give "
            "the position when saving."
        ) from error


def _name(known: Mapping[str, Any]) -> str | None:
    """What the author calls the donor; one without a name is called after the folder it is saved to."""
    named = known.get("name")
    return _UNPLAIN.sub("-", named).strip("-.") or None if isinstance(named, str) else None
