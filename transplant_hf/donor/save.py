"""Write a donor repo: weights, records, tokenizer and card, whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ..architecture.stack import stated_layers
from ..cards import DONOR_TEMPLATE, render_card, write_card
from ..config import DonorSpec, TransplantConfig
from ..display import parse_size, progress_bar
from ..errors import CheckpointError, ConfigurationError
from ..hub import push_folder
from ..layer_map import Placement, Position, Splice
from ..numeric import is_finite
from ..sources import points_to_folder
from ..storage import files_in, publish, read_json, sha256_of, write_json
from .companions import (
    COMPANION_FOLDERS,
    at_hand,
    copy_companions,
    has_tokenizer,
    is_companion,
    kept_in_repository,
    tokenizer_class,
)
from .entry import write_entry
from .record import DonorRecord, FileStamp
from .saved_files import (
    RECIPIENT_FOLDER,
    refuse_foreign_model,
    refuse_references_outside,
    replaced_among,
    replaced_in,
)
from .tensors import DONOR_INDEX, TensorStore, loaded_dtype

if TYPE_CHECKING:
    from .donor import Donor

_LONGEST_FOLDER = 100
# Names that every file system accepts, without a file's suffix; and the devices of Windows.
_FOLDER = re.compile(r"(?!.*\.[a-z]+$)\w([\w .-]*[\w-])?", re.IGNORECASE)
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def donor_folders(names: Sequence[str], foreign: Collection[str] = ()) -> list[str | None]:
    """Return the folders of donors with these names: one donor is at the root, several have a folder each."""
    if len(names) == 1:
        return [None]
    found: list[str | None] = []
    used = {RECIPIENT_FOLDER, *COMPANION_FOLDERS, *foreign}
    for number, name in enumerate(names, start=1):
        key = name.casefold()
        plain = _FOLDER.fullmatch(name) and len(name.encode()) <= _LONGEST_FOLDER
        if not plain or is_companion(key) or key in used or key.partition(".")[0] in _DEVICES:
            name = f"donor-{number}"
            while name in used or name in {other.casefold() for other in names}:
                name = f"{name}-{number}"
        used.add(name.casefold())
        found.append(name)
    return found


def refuse_recipients_place(recipient: str, folder: Path, revision: str | None, full: bool = False) -> None:
    """Refuse a folder in which this save, or the next full one, would replace the recipient itself."""
    path = points_to_folder(recipient, revision=revision)
    if path is None or not path.is_dir():
        return
    place = folder.expanduser().resolve()
    # A full save writes its recipient there again.
    if not full and path.resolve() == place / RECIPIENT_FOLDER:
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
    """Return the size of the vocabulary, from which adapters tell whether it was changed."""
    nested = [part for part in fields.values() if isinstance(part, Mapping)]
    return next((part["vocab_size"] for part in [fields, *nested] if isinstance(part.get("vocab_size"), int)), None)


def save_donor(donor: Donor, folder: Path, **options: Any) -> set[str]:
    """Write a donor repo into a folder, whole or not at all; see `Donor.save_pretrained`."""
    donor.verify()
    refuse_foreign_model(folder)
    with publish(folder, replaced_in) as staging:
        write_donor_repo(donor, staging, folder, **options)
        return files_in(staging)


def write_donor_repo(
    donor: Donor,
    staging: Path,
    folder: Path,
    *,
    position: Position | None = None,
    recipient: str | None = None,
    recipient_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    repo_id: str | None = None,
    license: str | None = None,
    mode: str | None = None,
    strength: float | None = None,
) -> None:
    """Write the files of a donor repo."""
    position = donor.position if position is None else position
    if position is None:
        raise ConfigurationError(
            f"donor {donor} has no recommended position. Pass one: save_pretrained(..., position=p)."
        )
    # What a repository records is on the Hub, whatever folders there are here.
    recorded_on_hub = not recipient and donor.source is not None and donor.source.from_hub
    recipient = recipient or donor.record.source_id
    if not recipient:
        raise ConfigurationError(
            f"donor {donor} does not know its recipient: its model was not loaded by name. Pass "
            "save_pretrained(..., recipient='user/model or folder')."
        )
    name = donor.name or folder.name
    revision = recipient_revision or (donor.record.source_revision if recipient == donor.record.source_id else None)
    refuse_recipients_place(recipient, folder, revision)
    strength = donor.strength if strength is None else strength
    spec = DonorSpec(".", position, mode or donor.mode, name=name, strength=strength)
    known = donor.companions
    place = str(known.folder) if known is not None and known.reference == recipient else recipient
    files = at_hand(place, revision or ("main" if recorded_on_hub else None))
    fields: Mapping[str, Any] = {}
    if recipient == donor.record.source_id:
        fields = donor.record.source_config
    elif files is not None and (files / "config.json").exists():
        fields = read_json(files / "config.json", "the recipient's config.json")
    num_layers = stated_layers(fields)
    if num_layers is not None:  # a splice checks positions
        Splice(num_layers, [Placement.of(spec, donor.record.layer_indices)])
    config = TransplantConfig(
        recipient=recipient if recorded_on_hub else written_reference(recipient, folder, revision),
        recipient_revision=revision,
        donors=[spec],
        vocab_size=vocabulary_of(donor.record.source_config),
    )
    record = write_donor(staging, dataclasses.replace(donor.record, name=name), donor.store, max_shard_size)
    copy_companions([(str(files), None)] if files is not None else [], staging, folder)
    config.tokenizer_class = tokenizer_class(record.model_type, staging)
    write_entry(staging, config)
    card = render_card(
        DONOR_TEMPLATE,
        repo_id or folder.absolute().name,
        config,
        [record],
        num_layers=num_layers,
        recipient_files=files,
        license=license,
        with_tokenizer=has_tokenizer(staging),
    )
    write_card(card, staging, folder)


def write_donor(folder: Path, record: DonorRecord, store: TensorStore, max_shard_size: int | str) -> DonorRecord:
    """Write a donor's weights and record into a folder, and return the record with the files' sha256."""
    infos, parts = store.infos(), store.slices()
    shapes = {name: torch.empty(one.shape, dtype=loaded_dtype(one.dtype), device="meta") for name, one in infos.items()}
    split = split_torch_state_dict_into_shards(
        shapes,
        filename_pattern="donor{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size, "max_shard_size (--max-shard-size)"),
    )
    stamps: dict[str, FileStamp] = {}
    with progress_bar(sum(tensor.nbytes for tensor in shapes.values()), "Writing donor") as progress:
        for filename, names in sorted(split.filename_to_tensors.items()):
            path = folder / filename
            tensors = {name: _finite_tensor(name, parts[name], store) for name in names}
            save_file(_without_overlaps(tensors), path, metadata={"format": "pt"})
            stamps[filename] = FileStamp(sha256_of(path), path.stat().st_size)
            progress.update(sum(tensor.nbytes for tensor in tensors.values()))
    if split.is_sharded:
        write_json(folder / DONOR_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    record = dataclasses.replace(record, files=stamps)
    record.write(folder)
    return record


def _finite_tensor(name: str, part: Any, store: TensorStore) -> torch.Tensor:
    tensor: torch.Tensor = part[...].detach().to("cpu").contiguous()
    if not is_finite(tensor):
        file = getattr(store, "path", None)
        raise CheckpointError(
            f"donor tensor {name!r}{f' in {file}' if file else ''} holds NaN or infinity; it is not saved. Use a "
            "checkpoint from before the training diverged."
        )
    return tensor


def _without_overlaps(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with another: safetensors files do not hold shared memory."""
    separate, end = {}, 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        tensor = tensors[name]
        separate[name] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return separate


def written_reference(recipient: str, folder: Path, revision: str | None) -> str:
    """Return how a `config.json` in `folder` refers to a recipient.

    A Hub id stays. A folder beside `folder` becomes relative, so that both can be moved together; any other folder
    becomes absolute.
    """
    path = points_to_folder(recipient, revision=revision)
    if path is None or not path.is_dir():
        return recipient
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder.parent):
        relative = os.path.relpath(path, folder)
        return relative if relative.startswith(".") else f"./{relative}"
    return str(path)


@contextmanager
def output_folder(output: str | os.PathLike[str] | None, push_to: str | None) -> Iterator[Path]:
    """Yield the folder to write a donor repo into: `output`, else a temporary one named after the repository."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / (push_to or "donor").rpartition("/")[2]


def push_saved(folder: Path, repo_id: str, files: Collection[str] | None, message: str, **kwargs: Any) -> CommitInfo:
    """Upload what was saved in a folder as one commit; by default all files."""
    refuse_references_outside(folder)
    kept = functools.partial(kept_in_repository, folder)
    return push_folder(
        folder, repo_id, commit_message=message, replaced=replaced_among, kept=kept, only=files, **kwargs
    )
