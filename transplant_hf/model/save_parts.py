"""Save donors beside what they go into: a reference to the recipient (thin), or the recipient itself.

The second is the transplant format. It is for layers that no native configuration can describe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..architecture import decoder_stack, is_packed, is_quantized
from ..architecture.build import build_on_meta
from ..cards import DONOR_TEMPLATE, render_card, write_card
from ..config import TransplantConfig
from ..donor.companions import at_hand, copy_companions, has_tokenizer, tokenizer_class
from ..donor.entry import write_entry
from ..donor.extract import checkpoint_tensors
from ..donor.record import DonorRecord
from ..donor.save import donor_folders, vocabulary_of, write_donor, written_reference
from ..donor.saved_files import RECIPIENT_FOLDER, foreign_names
from ..donor.tensors import MemoryTensors
from ..errors import ConfigurationError
from ..splice import Blueprint
from .as_loaded import quantization_of_recipient
from .recipient_in_model import live_recipient_config, recipient_state
from .save_thin_checks import check_unchanged, kept_overrides

logger = logging.get_logger(__name__)


def write_thin(
    model: Any,
    staging: Path,
    target: Path,
    kwargs: Mapping[str, Any],
    repo_id: str | None,
    license: str | None,
) -> None:
    """Write the donors and a pinned reference to the recipient."""
    state = model._transplant
    blueprint, config = state.blueprint, state.blueprint.config
    if not config.recipient:
        raise ConfigurationError(
            "a thin save refers to its recipient, but this model's recipient was not loaded by name. Save it in full, "
            "or load it with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    check_unchanged(model, recipient_state(model, kwargs.get("state_dict")))
    about_recipient = {
        "recipient": written_reference(config.recipient, target, config.recipient_revision),
        "recipient_revision": config.recipient_revision,
        "recipient_overrides": kept_overrides(model),
        "recipient_quantization": quantization_of_recipient(model),
    }
    saved, records = _write_donors(model, blueprint, foreign_names(target), staging, target, kwargs, about_recipient)
    card = render_card(
        DONOR_TEMPLATE,
        repo_id or target.absolute().name,
        saved,
        records,
        blueprint.layer_map(),
        recipient_files=at_hand(config.recipient, config.recipient_revision, state.hub.cache_dir),
        license=license,
        with_tokenizer=has_tokenizer(staging),
    )
    write_card(card, staging, target)


def write_with_recipient(
    model: Any, blueprint: Blueprint, staging: Path, target: Path, kwargs: Mapping[str, Any]
) -> list[DonorRecord]:
    """Write the donors and the recipient in a folder beside them; return the donors' records."""
    foreign = foreign_names(target)
    if RECIPIENT_FOLDER in foreign:
        raise ConfigurationError(
            f"{target / RECIPIENT_FOLDER} exists, and transplant_hf has no record of writing it: a save in the "
            "transplant format writes its recipient under that name. Choose another folder, or rename this one."
        )
    reason = "; ".join(blueprint.state(()).reasons[:2] or blueprint.beyond_native)
    logger.warning(
        f"No plain {type(model).__name__} checkpoint can describe these layers ({reason}): the folder is written in "
        "the transplant format, and loading it needs transplant_hf."
    )
    save_args = {name: kwargs[name] for name in ("max_shard_size", "save_original_format") if name in kwargs}
    weights = recipient_state(model, kwargs.get("state_dict"))
    _empty_recipient(model, blueprint).save_pretrained(staging / RECIPIENT_FOLDER, state_dict=weights, **save_args)
    about_recipient = {"recipient": f"./{RECIPIENT_FOLDER}"}
    return _write_donors(model, blueprint, foreign, staging, target, kwargs, about_recipient)[1]


def _write_donors(
    model: Any,
    blueprint: Blueprint,
    foreign: Any,
    staging: Path,
    target: Path,
    kwargs: Mapping[str, Any],
    about_recipient: Mapping[str, Any],
) -> tuple[TransplantConfig, list[DonorRecord]]:
    """Write the donors, the tokenizer and the configuration that joins donors and recipient."""
    folders = donor_folders(blueprint.splice.names, foreign)
    records = _write_layers(model, blueprint, folders, staging, kwargs)
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


def _write_layers(
    model: PreTrainedModel,
    blueprint: Blueprint,
    folders: Sequence[str | None],
    staging: Path,
    kwargs: Mapping[str, Any],
) -> list[DonorRecord]:
    records = []
    layer_map, state_dict = blueprint.layer_map(), kwargs.get("state_dict")
    for part, folder in zip(blueprint.parts, folders, strict=True):
        place = staging / folder if folder else staging
        place.mkdir(parents=True, exist_ok=True)
        numbers = layer_map.layers_of(part.name)
        if _is_away(model, blueprint, numbers):
            store = MemoryTensors(part.donor.tensors())  # what was loaded: packed or offloaded layers are not trained
        else:
            path = blueprint.recipient.stack_path
            store = MemoryTensors(checkpoint_tensors(model, path, numbers, state_dict=state_dict))
        record = dataclasses.replace(part.donor.record, name=part.name)
        records.append(write_donor(place, record, store, kwargs.get("max_shard_size", "5GB")))
    return records


def _is_away(model: PreTrainedModel, blueprint: Blueprint, numbers: Sequence[int]) -> bool:
    """Whether layers are offloaded, or were quantized while they were loaded."""
    stack = decoder_stack(model, blueprint.recipient.stack_path)
    weights = [parameter for number in numbers for parameter in stack[number].parameters()]
    return any(tensor.is_meta or (is_quantized(model) and is_packed(tensor)) for tensor in weights)


def copy_model_companions(state: Any, staging: Path, target: Path) -> None:
    """Copy tokenizer, processor and generation files of the transplant or its recipient, as far as they are here."""
    config = state.blueprint.config
    sources = [(config.name_or_path, None), (config.recipient, config.recipient_revision)]
    copy_companions(sources, staging, target, state.hub.cache_dir)


def _empty_recipient(model: PreTrainedModel, blueprint: Blueprint) -> PreTrainedModel:
    """A recipient without memory, to save the recipient's weights with."""
    config = live_recipient_config(model, blueprint)
    config.dtype = model.dtype
    empty = build_on_meta(blueprint.recipient.model_class, config)
    empty.tie_weights()
    if hasattr(model, "_weight_conversions"):
        empty._weight_conversions = model._weight_conversions
    if model.can_generate():
        empty.generation_config = model.generation_config
    return empty
