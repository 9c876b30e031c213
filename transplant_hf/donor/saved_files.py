"""Which files in a folder or repository belong to a saved donor, transplant or model; all others are the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..cards import CARD_FILE, began_as_ours, written_by_us
from ..config import DonorSpec, donor_specs
from ..errors import CheckpointError, ConfigurationError
from ..sources import Source, points_to_folder
from ..storage import check_output_folder, files_in, read_json
from .companions import NAMED_TEMPLATES, is_companion
from .entry import CODE_FILE, read_entry
from .record import DONOR_CONFIG, DonorRecord
from .tensors import DONOR_FILE, DONOR_INDEX, read_shard_index

# A full save in the transplant format holds its recipient here. A save whose recipient is already there is refused
# (`refuse_recipients_place`), so a reference that we wrote never points to a folder of that name that the user made.
RECIPIENT_FOLDER = "recipient"
_CONFIG = "config.json"
_MODEL_CONFIGS = {_CONFIG, "generation_config.json"}
_MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"(model|donor)(\.[^.]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^.]+)?\.json)?")


def check_artifact_folder(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a folder to save a donor, transplant or model into; see `check_output_folder`."""
    check_output_folder(folder, overwrite, _unrecorded)


def replaced_in(folder: Path) -> set[str]:
    """Return the files of the old donor, transplant or model in a folder, which the next save removes."""
    folder = folder.expanduser()
    names = files_in(folder)
    replaced = _replaced(names, _own_folders(folder))
    # Templates are written again where they are kept, see `copy_companions`.
    replaced |= {name for name in names if name.startswith(f"{NAMED_TEMPLATES}/") and is_companion(name)}
    return replaced | ({CARD_FILE} if written_by_us(_card_of(folder)) else set())


def replaced_among(names: Collection[str]) -> set[str]:
    """Return the files of the old donor, transplant or model among a repository's, which the next push removes."""
    folders = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == DONOR_CONFIG}
    return _replaced(names, folders | ({RECIPIENT_FOLDER} if folders else set()))


def _replaced(names: Iterable[str], folders: Collection[str]) -> set[str]:
    """The files at the root and in folders of ours that have the names that saves give."""
    found = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        saved = _WEIGHTS.fullmatch(last) is not None or last in (DONOR_CONFIG, _CONFIG, CODE_FILE)
        if folder == RECIPIENT_FOLDER:
            saved = saved or last in _MODEL_CONFIGS
        elif folder:
            saved = saved and last.startswith("donor")
        if saved and (not folder or folder in folders):
            found.add(name)
    return found


def foreign_names(folder: Path) -> set[str]:
    """Return the names in a folder, case-folded, that a save must not use for a folder of its own: the user's."""
    folder = folder.expanduser()
    if not folder.is_dir():
        return set()
    own = _own_folders(folder)
    return {
        path.name.casefold()
        for path in folder.iterdir()
        if path.name not in own and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))
    }


def refuse_foreign_model(folder: Path) -> None:
    """Refuse to save donors over a model that this package did not save, whose weights the save would delete."""
    folder = folder.expanduser()
    weights = sorted(path.name for path in folder.glob("model*") if _WEIGHTS.fullmatch(path.name))
    if weights and not _is_ours(folder):
        raise ConfigurationError(
            f"{folder} holds a model that transplant_hf did not save ({weights[0]}), and saving donors there would "
            "delete its weights. Choose another folder."
        )


def refuse_references_outside(folder: Path) -> None:
    """Refuse to upload a save that refers to another folder on this machine."""
    fields = read_entry(folder) or {}
    named = [("recipient", fields.get("recipient"), fields.get("recipient_revision"))]
    named += [("donor", spec.donor, spec.revision) for spec in donor_specs(fields.get("donors") or [])]
    for kind, reference, revision in named:
        place = points_to_folder(str(reference), Source(str(folder), folder), revision) if reference else None
        if place is not None and not place.resolve().is_relative_to(folder.resolve()):
            raise ConfigurationError(
                f"{folder / _CONFIG} names {kind} {reference!r}, a folder on this machine that nobody else has. Push "
                "that first, and use its Hub id: save_pretrained(..., recipient='user/model') of a donor, "
                "from_pretrained('user/model', donors=...) of a transplant, or the command that wrote it."
            )


def recorded_files(folder: Path) -> set[str]:
    """Return the files of a saved donor, transplant or model that its records name."""
    folder = folder.resolve()
    if not (folder / _CONFIG).is_file():
        return set()
    fields = read_entry(folder)
    if fields is None:
        named = {folder / name for name in _model_files(folder)}
    else:
        named = {folder / _CONFIG, folder / CODE_FILE}
        reference = str(fields.get("recipient") or "").replace("\0", "")
        recipient = points_to_folder(reference, Source(str(folder), folder)) if reference else None
        if recipient is not None and (recipient / _CONFIG).is_file():
            named |= {recipient / name for name in _model_files(recipient)}
        for _, place in _donors_of(folder, fields):
            if (place / DONOR_CONFIG).is_file():
                files = DonorRecord.read(place).files
                named |= {place / name for name in (DONOR_CONFIG, DONOR_FILE, DONOR_INDEX, *files)}
    return {path.relative_to(folder).as_posix() for path in named if path.is_relative_to(folder) and path.is_file()}


def _donors_of(folder: Path, fields: dict[str, Any]) -> Iterator[tuple[DonorSpec, Path]]:
    """The donors of a transplant that are in folders on this machine."""
    try:
        for spec in donor_specs(fields.get("donors")):
            place = points_to_folder(spec.donor, Source(str(folder), folder), spec.revision)
            if place is not None:
                yield spec, place / (spec.subfolder or "")
    except ConfigurationError as error:
        raise CheckpointError(
            f"{folder / _CONFIG} is malformed, so the files that belong to it are unknown: {error} Correct or delete "
            "it."
        ) from error


def _own_folders(folder: Path) -> set[str]:
    """The subfolders that saves made: those of several donors, and the recipient's."""
    fields = read_entry(folder)
    if fields is None:
        return set()
    own = {spec.subfolder for spec, _ in _donors_of(folder, fields) if spec.donor == "." and spec.subfolder}
    return own | ({RECIPIENT_FOLDER} if fields.get("recipient") == f"./{RECIPIENT_FOLDER}" else set())


def _model_files(folder: Path) -> set[str]:
    named = read_json(folder / _CONFIG, _CONFIG).get("transformers_weights")
    for weights in (*([named] if isinstance(named, str) else []), *_MODEL_WEIGHTS):
        index = weights if weights.endswith(".json") else f"{weights}.index.json"
        if index != weights and (folder / weights).is_file():
            return {*_MODEL_CONFIGS, weights}
        if (folder / index).is_file():
            return {*_MODEL_CONFIGS, index, *read_shard_index(folder / index).values()}
    return _MODEL_CONFIGS


def _unrecorded(folder: Path) -> set[str]:
    """The files that a save would replace because of their names, and that no record of ours names."""
    return _replaced(files_in(folder), _own_folders(folder)) - (recorded_files(folder) if _is_ours(folder) else set())


def _is_ours(folder: Path) -> bool:
    """Whether this package saved what is in a folder."""
    return read_entry(folder) is not None or began_as_ours(_card_of(folder))


def _card_of(folder: Path) -> str:
    card = folder / CARD_FILE
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
