"""Write a donor repo: weights, records, tokenizer and card, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..config import DonorSpec, TransplantConfig
from ..errors import CheckpointError, ConfigurationError
from ..storage import publish, read_json, sha256_of, write_json
from .card import donor_card
from .record import DONOR_CONFIG, DonorRecord, FileStamp
from .tensors import DONOR_INDEX, TensorStore

if TYPE_CHECKING:
    from .donor import Donor

__all__ = [
    "COMPANION_FILES",
    "copy_companions",
    "is_artefact_file",
    "refuse_recipients_place",
    "replaced_among",
    "replaced_in",
    "save_donor",
    "tokenizer_class",
    "transplant_fields",
    "vocabulary_of",
    "write_donor",
    "written_reference",
]

# What travels with a donor so that `pipeline` needs one name.
COMPANION_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
    "generation_config.json",
)
_PROGRESS_FROM = 1 << 28


def is_artefact_file(name: str) -> bool:
    """Whether a file belongs to a saved model or donor, and goes when it is saved anew."""
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return (weights and name.startswith(("model", "donor"))) or name in (DONOR_CONFIG, "config.json")


def replaced_in(folder: Path) -> Callable[[str], bool]:
    """Return what tells the old artefact's files and folders in a folder from all else in it."""
    path = folder / "config.json"
    fields = read_json(path, "the old config.json") if path.exists() else {}
    folders: set[str] = set()
    if fields.get("model_type") == TransplantConfig.model_type:
        own = [spec.get("subfolder") for spec in fields.get("donors", ()) if spec.get("donor") == "."]
        recipient = str(fields.get("recipient", ""))
        folders = {str(name) for name in own if name} | ({recipient[2:]} if recipient.startswith("./") else set())
    return lambda name: is_artefact_file(name) or name in folders


def replaced_among(names: Sequence[str]) -> set[str]:
    """Return the old artefact's files among a repository's: at its root, and in folders that hold a donor."""
    holders = {name.rpartition("/")[0] for name in names if name.endswith(f"/{DONOR_CONFIG}")}
    holders |= {"recipient"} if holders or DONOR_CONFIG in names else set()
    parts = [(name, *name.rpartition("/")[::2]) for name in names]
    return {name for name, folder, last in parts if is_artefact_file(last) and (not folder or folder in holders)}


def refuse_recipients_place(recipient: str, folder: Path) -> None:
    """Refuse to replace a recipient by what refers to it.

    Raises:
        ConfigurationError: The folder is the recipient's own.
    """
    if Path(recipient).expanduser().is_dir() and Path(recipient).expanduser().resolve() == folder.resolve():
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
) -> None:
    """Write a donor repo; see `Donor.save_pretrained`. `repo_id` is where it is going to be loaded from."""
    position = donor.position if position is None else position
    if position is None:
        raise ConfigurationError(
            f"donor {donor} has no recommended position; say where it belongs: save_pretrained(..., position=p)."
        )
    recipient = recipient or donor.record.source_id
    if not recipient:
        raise ConfigurationError(
            f"donor {donor} does not know its recipient: its model was not loaded by name. Pass "
            "save_pretrained(..., recipient='user/model or folder')."
        )
    refuse_recipients_place(recipient, folder)
    name = donor.name or folder.name
    revision = recipient_revision or (donor.record.source_revision if recipient == donor.record.source_id else None)
    config = TransplantConfig(
        recipient=written_reference(recipient, folder),
        recipient_revision=revision,
        donors=[DonorSpec(".", position=position, name=name)],
    )
    config.vocab_size = vocabulary_of(donor.record.source_config)
    with publish(folder, replaced_in(folder)) as staging:
        record = write_donor(staging, dataclasses.replace(donor.record, name=name), donor.store, max_shard_size)
        copy_companions(recipient, revision, staging)
        config.tokenizer_class = tokenizer_class(record.model_type, staging)
        write_json(staging / "config.json", transplant_fields(config))
        donor_card(record, config, repo_id or folder.name).save(staging / "README.md")


def write_donor(folder: Path, record: DonorRecord, store: TensorStore, max_shard_size: int | str) -> DonorRecord:
    """Write a donor's weights and record into a folder, and return the record with the files' sha256."""
    tensors = {name: part[...] for name, part in store.slices().items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="donor{suffix}.safetensors", max_shard_size=max_shard_size
    )
    stamps: dict[str, FileStamp] = {}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for filename, names in tqdm(
        sorted(split.filename_to_tensors.items()), desc="Writing donor", unit="file", disable=total < _PROGRESS_FROM
    ):
        save_file(_storable({name: tensors[name] for name in names}), folder / filename, metadata={"format": "pt"})
        stamps[filename] = FileStamp(sha256_of(folder / filename), (folder / filename).stat().st_size)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / DONOR_INDEX, index)
    record = dataclasses.replace(record, files=stamps)
    record.write(folder)
    return record


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Check that weights are finite, and give tied or strided ones memory of their own."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
            raise CheckpointError(f"donor tensor {name!r} holds NaN or infinity; it is not saved.")
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stored


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def transplant_fields(config: TransplantConfig) -> dict[str, Any]:
    """Return what `config.json` of a transplant holds, the fields a person looks for first."""
    fields = config.to_diff_dict()
    order = ["architectures", "model_type", "format_version", "recipient", "recipient_revision", "donors"]
    full = {**config.to_dict(), **fields}
    return {key: full[key] for key in order} | {key: fields[key] for key in sorted(fields) if key not in order}


def written_reference(recipient: str, folder: Path) -> str:
    """Return how a `config.json` in `folder` refers to a recipient.

    A Hub id stays; a folder next to `folder` becomes relative, so that the two can be moved together; any other
    folder becomes absolute.
    """
    path = Path(recipient).expanduser()
    if not path.is_dir():
        return recipient
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder.parent):
        relative = os.path.relpath(path, folder)
        return relative if relative.startswith(".") else f"./{relative}"
    return str(path)


def copy_companions(recipient: str, revision: str | None, folder: Path, cache_dir: str | None = None) -> None:
    """Copy the recipient's tokenizer and generation config, when they are at hand; nothing is downloaded."""
    source = Path(recipient).expanduser()
    if not source.is_dir():
        try:
            source = Path(snapshot_download(recipient, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return
    for path in _matching(source, COMPANION_FILES):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def tokenizer_class(model_type: str, folder: Path) -> str | None:
    """Return the tokenizer's class where only the recipient's model type tells it, as for the original GPT-2.

    A transplant has a model type of its own, so its `config.json` must say it.
    """
    path = folder / "tokenizer_config.json"
    if path.exists() and read_json(path, "the tokenizer's configuration").get("tokenizer_class"):
        return None
    return TOKENIZER_MAPPING_NAMES.get(model_type) if _matching(folder, COMPANION_FILES[:2]) else None


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
