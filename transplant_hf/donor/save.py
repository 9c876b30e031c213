"""Write a donor repo: weights, records, tokenizer and card, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from ..config import DonorSpec, TransplantConfig
from ..display import parse_size
from ..errors import ConfigurationError
from ..sources import points_to_folder
from ..storage import publish, write_json
from .card import write_donor_card
from .companions import COMPANION_FOLDERS, at_hand, copy_companions, is_companion, tokenizer_class
from .dtypes import loaded_dtype
from .entry import write_entry
from .record import DonorRecord, FileStamp
from .saved_files import RECIPIENT_FOLDER, replaced_in
from .stream import size_of, write_safetensors
from .tensors import DONOR_INDEX, TensorStore

if TYPE_CHECKING:
    from .donor import Donor

__all__ = [
    "donor_folders",
    "refuse_recipients_place",
    "save_donor",
    "vocabulary_of",
    "write_donor",
    "written_reference",
]

_PROGRESS_FROM = 1 << 28
_LONGEST_FOLDER = 100
# Words, dots and spaces as every file system has them, without a file's ending; and the devices of Windows.
_FOLDER = re.compile(r"(?!.*\.[a-z]+$)\w([\w .-]*[\w-])?", re.IGNORECASE)
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def donor_folders(names: Sequence[str], foreign: Collection[str] = ()) -> list[str | None]:
    """Return the folders that donors of these names get: one donor lies at the root, several have a folder each.

    A folder is called as its donor where every file system takes that name and nothing else beside it can have it.

    Args:
        names: The donors' names.
        foreign: Names in the folder they are saved into that are not theirs to take; see `foreign_names`.

    Example:
        >>> donor_folders(["law", "README.md", "LAW"]), donor_folders(["law"])
        (['law', 'donor-2', 'donor-3'], [None])
    """
    if len(names) == 1:
        return [None]
    found: list[str | None] = []
    taken = {RECIPIENT_FOLDER, *foreign}
    for number, name in enumerate(names, start=1):
        plain = _FOLDER.fullmatch(name) and len(name.encode()) <= _LONGEST_FOLDER
        of_recipient = is_companion(name.casefold()) or name.casefold() in COMPANION_FOLDERS
        if not plain or of_recipient or name.casefold() in taken or name.partition(".")[0].casefold() in _DEVICES:
            name = f"donor-{number}"
            while name in taken or name in {other.casefold() for other in names}:
                name = f"{name}-{number}"
        taken.add(name.casefold())
        found.append(name)
    return found


def refuse_recipients_place(recipient: str, folder: Path, revision: str | None) -> None:
    """Refuse to replace a recipient by what refers to it, now or with the next save.

    Raises:
        ConfigurationError: The folder is the recipient's own, or the recipient lies where full saves write theirs.
    """
    path = points_to_folder(recipient, revision=revision)
    if path is None or not path.is_dir():
        return
    place = folder.expanduser().resolve()
    if path.resolve() == place / RECIPIENT_FOLDER:
        raise ConfigurationError(
            f"{folder} holds the recipient in its subfolder {RECIPIENT_FOLDER}, where a full save in the transplant "
            "format writes its own recipient, so that a later save would replace it. Choose another folder, or rename "
            "the subfolder and load the recipient from there."
        )
    if path.resolve() == place:
        raise ConfigurationError(
            f"{folder} is the folder of the recipient itself, whose weights would be lost. Choose another folder."
        )


def vocabulary_of(fields: Mapping[str, Any]) -> int | None:
    """Return the vocabulary's size, by which adapters trained on a transplant see whether it was changed."""
    nested = [part for part in fields.values() if isinstance(part, Mapping)]
    return next((part["vocab_size"] for part in [fields, *nested] if isinstance(part.get("vocab_size"), int)), None)


def save_donor(
    donor: Donor,
    folder: Path,
    position: int | None,
    recipient: str | None,
    recipient_revision: str | None,
    max_shard_size: int | str,
    repo_id: str | None = None,
    check: Callable[[Path], None] = lambda folder: None,
    license: str | None = None,
    mode: str | None = None,
    strength: float | None = None,
) -> None:
    """Write a donor repo; see `Donor.save_pretrained`.

    Args:
        donor: The donor.
        folder: The folder.
        position: The recommended position.
        recipient: The recipient it is meant for.
        recipient_revision: Its revision.
        max_shard_size: Largest weight file.
        repo_id: Where it is going to be loaded from.
        check: Looks at the written folder before it takes its place, and raises if anything is wrong.
        license: What the card names as the licence; by default what the author or the recipient's card says.
        mode: The recommended mode; by default the donor's.
        strength: The recommended strength; by default the donor's.
    """
    position = donor.position if position is None else position
    if position is None:
        raise ConfigurationError(
            f"donor {donor} has no recommended position; say where it belongs: save_pretrained(..., position=p)."
        )
    # What a repository records is on the Hub, whatever folders there are here.
    recorded_there = not recipient and donor.source is not None and donor.source.from_hub
    recipient = recipient or donor.record.source_id
    if not recipient:
        raise ConfigurationError(
            f"donor {donor} does not know its recipient: its model was not loaded by name. Pass "
            "save_pretrained(..., recipient='user/model or folder')."
        )
    name = donor.name or folder.name
    revision = recipient_revision or (donor.record.source_revision if recipient == donor.record.source_id else None)
    refuse_recipients_place(recipient, folder, revision)
    place = DonorSpec(
        ".",
        position=position,
        mode=mode or donor.mode,
        name=name,
        strength=donor.strength if strength is None else strength,
    )
    written = recipient if recorded_there else written_reference(recipient, folder, revision)
    config = TransplantConfig(
        recipient=written,
        recipient_revision=revision,
        donors=[place],
        vocab_size=vocabulary_of(donor.record.source_config),
    )
    files = at_hand(donor.companions_in(recipient), revision or ("main" if recorded_there else None))
    with publish(folder, replaced_in) as staging:
        record = write_donor(staging, dataclasses.replace(donor.record, name=name), donor.store, max_shard_size)
        copy_companions([(str(files), None)] if files is not None else [], staging, folder)
        config.tokenizer_class = tokenizer_class(record.model_type, staging)
        write_entry(staging, config)
        write_donor_card(staging, folder, config, [record], repo_id, recipient_files=files, license=license)
        check(staging)


def write_donor(folder: Path, record: DonorRecord, store: TensorStore, max_shard_size: int | str) -> DonorRecord:
    """Write a donor's weights and record into a folder, and return the record with the files' sha256."""
    infos, parts = store.infos(), store.slices()
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(info.shape, dtype=loaded_dtype(info.dtype), device="meta") for name, info in infos.items()},
        filename_pattern="donor{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
    )
    stamps: dict[str, FileStamp] = {}
    total = sum(map(size_of, infos.values()))
    with tqdm(total=total, desc="Writing donor", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM) as progress:
        for filename, names in sorted(split.filename_to_tensors.items()):
            digest = write_safetensors(folder / filename, {name: infos[name] for name in names}, parts, progress)
            stamps[filename] = FileStamp(digest, (folder / filename).stat().st_size)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / DONOR_INDEX, index)
    record = dataclasses.replace(record, files=stamps)
    record.write(folder)
    return record


def written_reference(recipient: str, folder: Path, revision: str | None) -> str:
    """Return how a `config.json` in `folder` refers to a recipient.

    A Hub id stays; a folder next to `folder` becomes relative, so that the two can be moved together; any other
    folder becomes absolute.
    """
    path = points_to_folder(recipient, revision=revision)
    if path is None or not path.is_dir():
        return recipient
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder.parent):
        relative = os.path.relpath(path, folder)
        return relative if relative.startswith(".") else f"./{relative}"
    return str(path)
