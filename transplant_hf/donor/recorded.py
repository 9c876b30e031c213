"""What the records in a folder name as parts of a saved donor, transplant or model; all else there is the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..cards import CARD_FILE, written_by_us
from ..cards.authorship import began_as_ours
from ..config import DonorSpec, TransplantConfig, donor_specs
from ..errors import CheckpointError, ConfigurationError
from ..outputs import check_output_folder, files_in
from ..storage import read_json
from .companions import NAMED_TEMPLATES, is_companion
from .entry import CODE_FILE
from .record import DONOR_CONFIG, DonorRecord
from .tensors import DONOR_FILE, DONOR_INDEX

__all__ = [
    "RECIPIENT_FOLDER",
    "check_artefact_folder",
    "foreign_names",
    "is_artefact_file",
    "recorded_files",
    "replaced_in",
]

# A full save in the transplant format has its recipient in it. A save whose recipient lies there already is refused,
# see `refuse_recipients_place`, so that no reference of ours leads to a folder of that name that the user made.
RECIPIENT_FOLDER = "recipient"
_CONFIG = "config.json"
_MODEL_CONFIGS = {_CONFIG, "generation_config.json"}
_MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"(model|donor)(\.[^.]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^.]+)?\.json)?")


def is_artefact_file(name: str) -> bool:
    """Whether a file has a name that saved models and donors give to theirs, so that the next save replaces it."""
    return _WEIGHTS.fullmatch(name) is not None or name in (DONOR_CONFIG, _CONFIG, CODE_FILE)


def check_artefact_folder(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a folder to write an artefact into; see `check_output_folder`.

    Raises:
        ConfigurationError: It is not empty, or `overwrite` would replace what transplant_hf did not write.
        CheckpointError: A record in it is malformed.
    """
    check_output_folder(folder, overwrite, _strangers)


def replaced_in(folder: Path) -> Callable[[str], bool]:
    """Return what tells the old artefact's files, by their paths in a folder, from all else in it.

    Raises:
        CheckpointError: The old `config.json` is malformed.
    """
    folder = folder.expanduser()
    own = _own_folders(folder)
    card = folder / CARD_FILE
    replaces_card = card.is_file() and written_by_us(card.read_text(encoding="utf-8", errors="replace"))

    def replaced(name: str) -> bool:
        place, _, last = name.rpartition("/")
        if not place:
            return is_artefact_file(name) or (name == CARD_FILE and replaces_card)
        if place.partition("/")[0] == NAMED_TEMPLATES:
            return is_companion(name)  # written again where they are kept, see `copy_companions`
        if place == RECIPIENT_FOLDER:
            return place in own and (is_artefact_file(last) or last in _MODEL_CONFIGS)
        return place in own and is_artefact_file(last) and last.startswith("donor")

    return replaced


def foreign_names(folder: Path) -> set[str]:
    """Return the names in a folder, case-folded, that a save may not give to a folder of its own: the user's."""
    folder = folder.expanduser()
    if not folder.is_dir():
        return set()
    own = _own_folders(folder)
    return {
        path.name.casefold()
        for path in folder.iterdir()
        if path.name not in own and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))
    }


def _own_folders(folder: Path) -> set[str]:
    """The subfolders that saves in the transplant format made: several donors' folders, and the recipient's."""
    path = folder / _CONFIG
    fields = read_json(path, "the old config.json") if path.exists() else {}
    if not _is_transplant(fields):
        return set()
    specs = _recorded_donors(folder, fields)
    donors = {spec.subfolder for spec in specs if spec.donor == "." and spec.subfolder}
    return donors | ({RECIPIENT_FOLDER} if fields.get("recipient") == f"./{RECIPIENT_FOLDER}" else set())


def recorded_files(folder: Path) -> set[str]:
    """Return the files of a saved donor, transplant or model that its own records name.

    Args:
        folder: The folder.

    Returns:
        Configurations, records, weight files and their indices as paths relative to the folder, `/` between the parts;
        not the card, the tokenizer and the like. Empty where there is no `config.json`.

    Raises:
        CheckpointError: A record is malformed.
    """
    if not (folder / _CONFIG).is_file():
        return set()
    fields = read_json(folder / _CONFIG, _CONFIG)
    if _is_transplant(fields):
        named = {_CONFIG, CODE_FILE}
        recipient = _inside(str(fields.get("recipient") or "").removeprefix("./"))
        if recipient and (folder / recipient / _CONFIG).is_file():
            named |= {f"{recipient}/{name}" for name in _model_files(folder / recipient)}
        for subfolder in _own_donors(folder, fields):
            named |= {f"{subfolder}/{name}" if subfolder else name for name in _donor_files(folder / subfolder)}
    else:
        named = _model_files(folder)
    return {name for name in named if (folder / name).is_file()}


def _is_transplant(fields: dict[str, Any]) -> bool:
    return fields.get("model_type") == TransplantConfig.model_type


def _recorded_donors(folder: Path, fields: Mapping[str, Any]) -> list[DonorSpec]:
    """Read the donors in the fields of a folder's `config.json`.

    Raises:
        CheckpointError: They are malformed.
    """
    try:
        return donor_specs(fields.get("donors"))
    except ConfigurationError as error:
        raise CheckpointError(
            f"{folder / _CONFIG} is malformed, so that what belongs to it is not known: {error} Correct or delete it."
        ) from error


def _own_donors(folder: Path, fields: dict[str, Any]) -> set[str]:
    """The folders of the donors that lie in the same repository; "" is its root."""
    specs = _recorded_donors(folder, fields)
    places = [PurePosixPath(spec.donor, spec.subfolder or "").as_posix() for spec in specs]
    return {_inside(place.removeprefix("./")) if place != "." else "" for place in places}


def _inside(name: str) -> str:
    """A relative path as it is; "" for what leads elsewhere."""
    path = PurePosixPath(name)
    return "" if not name or path.is_absolute() or ".." in path.parts else path.as_posix()


def _donor_files(folder: Path) -> set[str]:
    if not (folder / DONOR_CONFIG).is_file():
        return set()
    return {DONOR_CONFIG, DONOR_FILE, DONOR_INDEX, *DonorRecord.read(folder).files}


def _model_files(folder: Path) -> set[str]:
    fields = read_json(folder / _CONFIG, _CONFIG)
    named = fields.get("transformers_weights")
    for weights in (*([named] if isinstance(named, str) else []), *_MODEL_WEIGHTS):
        index = weights if weights.endswith(".json") else f"{weights}.index.json"
        if index != weights and (folder / weights).is_file():
            return {*_MODEL_CONFIGS, weights}
        if (folder / index).is_file():
            shards = read_json(folder / index, "the shard index").get("weight_map")
            found = map(str, shards.values()) if isinstance(shards, dict) else ()
            return {*_MODEL_CONFIGS, index, *filter(None, map(_inside, found))}
    return _MODEL_CONFIGS


def _strangers(folder: Path) -> set[str]:
    """The files that a save replaces by their names, and that no record of ours names."""
    own = recorded_files(folder) if _is_ours(folder) else set()
    replaced = replaced_in(folder)
    return {name for name in files_in(folder) if is_artefact_file(name.rpartition("/")[2]) and replaced(name)} - own


def _is_ours(folder: Path) -> bool:
    """Whether transplant_hf made the artefact in a folder: its configuration says so, or a card that it began."""
    config, card = folder / _CONFIG, folder / CARD_FILE
    if config.is_file() and _is_transplant(read_json(config, _CONFIG)):
        return True
    return card.is_file() and began_as_ours(card.read_text(encoding="utf-8", errors="replace"))
