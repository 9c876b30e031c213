"""Save donors beside what they go into: a reference to the recipient (thin), or the recipient itself.

The second is the transplant format. It is for layers that no native configuration can describe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..architecture import decoder_stack, is_packed, is_quantized
from ..architecture.build import build_on_meta
from ..cards import DONOR_TEMPLATE, FULL_TEMPLATE, render_card, write_card
from ..config import TransplantConfig
from ..donor.companions import at_hand, copy_companions, has_tokenizer, tokenizer_class
from ..donor.entry import CODE_FILE, write_entry
from ..donor.extract import checkpoint_tensors
from ..donor.record import DonorRecord
from ..donor.save import donor_folders, vocabulary_of, write_donor, written_reference
from ..donor.saved_files import RECIPIENT_FOLDER, foreign_names
from ..donor.tensors import MemoryTensors
from ..errors import ConfigurationError
from ..heads import BASE, CAUSAL_LM, head_of
from .recipient_in_model import (
    changed,
    check_unchanged,
    config_changes,
    kept_overrides,
    quantization_of_recipient,
    recipient_state,
)

logger = logging.get_logger(__name__)


def write_thin(
    model: Any, staging: Path, target: Path, kwargs: Mapping[str, Any], repo_id: str | None, license: str | None
) -> None:
    """Write the donors and a pinned reference to the recipient."""
    config = model._transplant.blueprint.config
    if not config.recipient:
        raise ConfigurationError(
            "a thin save refers to its recipient, but this model's recipient was not loaded by name. Save it in full, "
            "or load it with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    check_unchanged(model, recipient_state(model, kwargs.get("state_dict")))
    saved, records = _write_donors(
        model,
        staging,
        target,
        kwargs,
        recipient=written_reference(config.recipient, target, config.recipient_revision),
        recipient_revision=config.recipient_revision,
        recipient_overrides=kept_overrides(model),
        recipient_quantization=quantization_of_recipient(model),
    )
    _write_card(model, DONOR_TEMPLATE, staging, target, repo_id, saved, records, license=license)


def write_with_recipient(model: Any, staging: Path, target: Path, kwargs: Mapping[str, Any]) -> list[DonorRecord]:
    """Write the donors and the recipient in a folder beside them; return the donors' records."""
    blueprint = model._transplant.blueprint
    if RECIPIENT_FOLDER in foreign_names(target):
        raise ConfigurationError(
            f"{target / RECIPIENT_FOLDER} exists, and transplant_hf has no record of writing it: a save in the "
            "transplant format writes its recipient under that name. Choose another folder, or rename this one."
        )
    reason = "; ".join(blueprint.state(()).reasons[:2] or blueprint.beyond_native)
    logger.warning(
        f"No plain {type(model).__name__} checkpoint can describe these layers ({reason}): the folder is written in "
        "the transplant format, and loading it needs transplant_hf."
    )
    # A recipient without memory, to save the recipient's weights with.
    config = changed(blueprint.recipient.config, config_changes(model, blueprint))
    config.dtype = model.dtype
    empty = build_on_meta(blueprint.recipient.model_class, config)
    empty.tie_weights()
    if hasattr(model, "_weight_conversions"):
        empty._weight_conversions = model._weight_conversions
    if model.can_generate():
        empty.generation_config = model.generation_config
    save_args = {name: kwargs[name] for name in ("max_shard_size", "save_original_format") if name in kwargs}
    weights = recipient_state(model, kwargs.get("state_dict"))
    empty.save_pretrained(staging / RECIPIENT_FOLDER, state_dict=weights, **save_args)
    return _write_donors(model, staging, target, kwargs, recipient=f"./{RECIPIENT_FOLDER}")[1]


def _write_donors(
    model: Any, staging: Path, target: Path, kwargs: Mapping[str, Any], **about_recipient: Any
) -> tuple[TransplantConfig, list[DonorRecord]]:
    """Write the donors, the tokenizer and the configuration that joins donors and recipient."""
    blueprint = model._transplant.blueprint
    folders = donor_folders(blueprint.splice.names, foreign_names(target))
    layer_map, path, records = blueprint.layer_map(), blueprint.recipient.stack_path, []
    stack = decoder_stack(model, path)
    for part, folder in zip(blueprint.parts, folders, strict=True):
        place = staging / folder if folder else staging
        place.mkdir(parents=True, exist_ok=True)
        numbers = layer_map.layers_of(part.name)
        weights = [parameter for number in numbers for parameter in stack[number].parameters()]
        if any(tensor.is_meta or (is_quantized(model) and is_packed(tensor)) for tensor in weights):
            tensors = part.donor.tensors()  # what was loaded: packed or offloaded layers are not trained
        else:
            tensors = checkpoint_tensors(model, path, numbers, state_dict=kwargs.get("state_dict"))
        record = dataclasses.replace(part.donor.record, name=part.name)
        records.append(write_donor(place, record, MemoryTensors(tensors), kwargs.get("max_shard_size", "5GB")))
    saved = TransplantConfig(
        **about_recipient,
        donors=[
            dataclasses.replace(part.spec, donor=".", subfolder=folder, revision=None, layers=None, name=part.name)
            for part, folder in zip(blueprint.parts, folders, strict=True)
        ],
        composition=blueprint.config.composition,
        vocab_size=vocabulary_of(blueprint.recipient.config.to_dict()),
    )
    if model.can_generate():
        model.generation_config.save_pretrained(staging)
    copy_model_companions(model._transplant, staging, target)
    saved.tokenizer_class = tokenizer_class(blueprint.recipient.config.model_type, staging)
    write_entry(staging, saved)
    return saved, records


def copy_model_companions(state: Any, staging: Path, target: Path) -> None:
    """Copy tokenizer, processor and generation files of the transplant or its recipient, as far as they are here."""
    config = state.blueprint.config
    sources = [(config.name_or_path, None), (config.recipient, config.recipient_revision)]
    copy_companions(sources, staging, target, state.hub.cache_dir)


# -- Model cards -----------------------------------------------------------------------------------------------------


def write_full_card(
    model: Any,
    staging: Path,
    target: Path,
    records: Sequence[DonorRecord],
    repo_id: str | None = None,
    license: str | None = None,
) -> None:
    """Write the card of a full save, with the donors that run."""
    state = model._transplant
    config = state.blueprint.config
    folders = donor_folders(state.blueprint.splice.names, foreign_names(target))
    donors = [
        (dataclasses.replace(part.spec, subfolder=folder), record)
        for part, record, folder in zip(state.blueprint.parts, records, folders, strict=True)
        if part.name not in state.disabled
    ]
    running = config.replaced(donors=[spec for spec, _ in donors])
    facts = {
        "license": license,
        "native": not (staging / CODE_FILE).exists(),
        "head": head_of([type(model).__name__], model.config) or (CAUSAL_LM if model.can_generate() else BASE),
    }
    _write_card(model, FULL_TEMPLATE, staging, target, repo_id, running, [record for _, record in donors], **facts)


def _write_card(
    model: Any,
    template: str,
    staging: Path,
    target: Path,
    repo_id: str | None,
    config: TransplantConfig,
    records: Sequence[DonorRecord],
    **facts: Any,
) -> None:
    """Write a card, unless a person wrote or edited the one that is there."""
    own, cache_dir = model._transplant.blueprint.config, model._transplant.hub.cache_dir
    facts["recipient_files"] = at_hand(own.recipient, own.recipient_revision, cache_dir) if own.recipient else None
    facts["with_tokenizer"] = has_tokenizer(staging)
    name = repo_id or target.absolute().name
    write_card(render_card(template, name, config, records, model.layer_map, **facts), staging, target)
