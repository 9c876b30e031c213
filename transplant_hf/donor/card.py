"""The card of a donor repo: what its record and its configuration say, as facts for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import CONFIG_MAPPING, PreTrainedConfig
from yaml import YAMLError

from ..cards import (
    CARD_FILE,
    CardFacts,
    DonorFacts,
    FileFacts,
    License,
    donor_card,
    keeps_its_card,
    license_in,
    license_named,
)
from ..config import DonorSpec, TransplantConfig
from ..layer_map import LayerMap, Placement, Splice
from ..storage import read_json
from .companions import has_tokenizer
from .record import DonorRecord

__all__ = ["chosen_license", "donor_facts", "write_donor_card"]


def write_donor_card(
    staging: Path,
    target: Path,
    config: TransplantConfig,
    records: Sequence[DonorRecord],
    repo_id: str | None = None,
    *,
    recipient_files: Path | None,
    layer_map: LayerMap | None = None,
    license: str | None = None,
) -> None:
    """Write the card of a thin transplant, unless a person wrote one.

    Args:
        staging: The folder to write into.
        target: The folder that it is going to replace.
        config: What is saved; all its donors are in the folder.
        records: What is known of each donor.
        repo_id: Where it is going to be loaded from, if not from the target.
        recipient_files: Where the recipient's files are, as far as they are at hand.
        layer_map: What runs, if that is known.
        license: What was passed.
    """
    named = license_named(license) if license is not None else None
    if keeps_its_card(target):
        return
    drawn = (layer_map, True) if layer_map is not None else _layer_map(config, records, recipient_files)
    facts = CardFacts(
        repo=repo_id or target.absolute().name,
        model_type=records[0].model_type,
        donors=tuple(donor_facts(record, spec) for record, spec in zip(records, config.donors, strict=True)),
        layer_map=drawn[0],
        whole_map=drawn[1],
        recipient=config.recipient,
        recipient_revision=config.recipient_revision,
        license=named or chosen_license(records, recipient_files, of_all=False),
        with_tokenizer=has_tokenizer(staging),
        side_by_side=bool(config.side_by_side_groups),
    )
    donor_card(facts).save(staging / CARD_FILE)


def donor_facts(record: DonorRecord, spec: DonorSpec) -> DonorFacts:
    """Say of a donor what its record and its place say; its files are those beside the card."""
    folder = f"{spec.subfolder}/" if spec.subfolder else ""
    return DonorFacts(
        name=str(spec.name),
        layers=record.layer_indices,
        position=spec.position,
        mode=spec.mode,
        strength=spec.strength,
        source=record.source_id,
        metadata=record.metadata,
        files=tuple(
            FileFacts(f"{folder}{name}", stamp.size, stamp.sha256) for name, stamp in sorted(record.files.items())
        ),
    )


def chosen_license(records: Sequence[DonorRecord], folder: Path | None, *, of_all: bool) -> License | None:
    """Return the licence that is known to hold, or `None`.

    Args:
        records: The donors'.
        folder: Where the recipient's files are, as far as they are at hand.
        of_all: Whether the recipient's weights are in the repository too, so that all of them must agree.
    """
    donors = {license_in(record.metadata) for record in records}
    if not of_all and donors != {None}:
        return donors.pop() if len(donors) == 1 else None
    recipient = _license_of(folder)
    return recipient if not of_all or donors == {recipient} else None


def _license_of(folder: Path | None) -> License | None:
    """The licence in a model's own card."""
    card = folder / CARD_FILE if folder else None
    if card is None or not card.is_file():
        return None
    try:
        return license_in(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, YAMLError):  # a stranger's card that cannot be read names no licence
        return None


def _layer_map(config: TransplantConfig, records: Sequence[DonorRecord], folder: Path | None) -> tuple[LayerMap, bool]:
    """Draw what runs, as far as the recipient's layers are known to reach."""
    placements = [
        Placement(str(spec.name), spec.position, record.layer_indices, spec.mode == "replace")
        for spec, record in zip(config.donors, records, strict=True)
    ]
    reach = max(max(placement.position, placement.replaced.stop) for placement in placements)
    if folder is not None and (folder / "config.json").is_file():
        count = _layer_count(read_json(folder / "config.json", "the recipient's config.json"))
    else:
        count = _layer_count(records[0].source_config) if records[0].source_id == config.recipient else None
    known = count is not None and count >= reach
    return Splice(count if known and count is not None else reach, placements).layer_map(), known


def _layer_count(fields: Mapping[str, Any]) -> int | None:
    """How many layers a `config.json` names, under whatever word its model type has for them."""
    nested = fields.get("text_config")
    if isinstance(nested, Mapping):
        return _layer_count(nested)
    model_type = fields.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    words = (CONFIG_MAPPING[str(model_type)] if known else PreTrainedConfig).attribute_map
    count = fields.get(words.get("num_hidden_layers", "num_hidden_layers"))
    return count if isinstance(count, int) else None
