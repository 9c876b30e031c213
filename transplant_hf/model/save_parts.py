"""Save donors beside what they go into: a reference to the recipient (thin), or the recipient itself.

The second is the transplant format. It is for layers that no native configuration can describe.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..architecture import decoder_stack, eval_mode, is_packed, is_quantized, output_weights
from ..architecture.build import build_on_meta
from ..architecture.identity import Call, record_calls
from ..cards import DONOR_TEMPLATE, FULL_TEMPLATE, render_card, write_card
from ..config import TransplantConfig
from ..display import some_of
from ..donor.companions import at_hand, copy_companions, has_tokenizer, tokenizer_class
from ..donor.entry import CODE_FILE, write_entry
from ..donor.extract import checkpoint_tensors
from ..donor.record import DonorRecord
from ..donor.save import donor_folders, vocabulary_of, write_donor, written_reference
from ..donor.saved_files import RECIPIENT_FOLDER, foreign_names
from ..donor.tensors import MemoryTensors
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..heads import BASE, CAUSAL_LM, head_of
from .recipient_in_model import check_unchanged, kept_overrides, live_config, quantization_of_recipient, recipient_state

logger = logging.get_logger(__name__)

_TOLERANCE = 1e-5  # of what the layer adds, in float32
_SEED = 0


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
    facts = {"template": DONOR_TEMPLATE, "config": saved, "records": records, "license": license}
    _write_card(model, staging, target, repo_id, **facts)


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
    config = live_config(model)
    config.dtype = model.dtype
    empty = build_on_meta(blueprint.recipient.model_class, config)
    empty.tie_weights()
    if hasattr(model, "_weight_conversions"):
        empty._weight_conversions = model._weight_conversions
    if model.can_generate():
        empty.generation_config = model.generation_config
    save_args = {name: kwargs[name] for name in ("max_shard_size", "save_original_format") if name in kwargs}
    weights = recipient_state(model, kwargs.get("state_dict"))
    if away := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise ConfigurationError(
            f"weights of layers that donors replace are offloaded and cannot be read ({some_of(away)}). Save with "
            "thin=True, or load the model without offload."
        )
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
    facts = {
        "template": FULL_TEMPLATE,
        "config": config.replaced(donors=[spec for spec, _ in donors]),
        "records": [record for _, record in donors],
        "license": license,
        "native": not (staging / CODE_FILE).exists(),
        "head": head_of([type(model).__name__], model.config) or (CAUSAL_LM if model.can_generate() else BASE),
    }
    _write_card(model, staging, target, repo_id, **facts)


def _write_card(model: Any, staging: Path, target: Path, repo_id: str | None, **facts: Any) -> None:
    """Write a card, unless a person wrote or edited the one that is there."""
    own, cache_dir = model._transplant.blueprint.config, model._transplant.hub.cache_dir
    facts["recipient_files"] = at_hand(own.recipient, own.recipient_revision, cache_dir) if own.recipient else None
    facts |= {"repo": repo_id or target.absolute().name, "layer_map": model.layer_map}
    write_card(render_card(with_tokenizer=has_tokenizer(staging), **facts), staging, target)


# -- The strength of a donor as weights, for a plain checkpoint --------------------------------------------------------
# If a donor's layer adds all its parts to the same hidden state, scaled output weights scale what the layer adds. This
# holds where attention and MLP run in parallel on the same input (GPT-NeoX, Falcon, Cohere, Phi), and not where one
# reads what the other added. Both are run on a few tokens and compared.


def folded_strengths(model: Any, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor] | None:
    """Return weights with which the donors compute the same at strength 1 as they do now at their strengths."""
    blueprint = model._transplant.blueprint
    scaled = {name: blueprint.part(name) for name in blueprint.scaled}
    plain = blueprint.state(()).native and not blueprint.side_by_side_groups
    # At strength 0 the file would not have the donor's weights.
    if not plain or any(part.donor.num_layers > 1 or part.spec.strength == 0 for part in scaled.values()):
        return None
    path = blueprint.recipient.stack_path
    stack, layer_map = decoder_stack(model, path), blueprint.layer_map()
    numbers = {name: layer_map.layers_of(name)[0] for name in scaled}
    if any(one.is_meta for number in numbers.values() for one in stack[number].parameters()):
        return None  # offloaded
    try:
        weights = output_weights(model, path, list(numbers.values()))
        with eval_mode(model):
            calls = record_calls(model, stack, list(numbers.values()), _SEED)
    except (CompatibilityError, CheckpointError):  # the output weights of a layer are unknown
        return None
    folded: dict[str, torch.Tensor] = {}
    for name, number in numbers.items():
        strength = scaled[name].spec.strength
        layer = stack[number]
        silent = weights[number]
        own = {key: _scaled(layer.get_parameter(key).detach(), silent[key], strength) for key in silent}
        if not _computes_the_same(layer, own, strength, calls[number]):
            return None
        for key, tensor in own.items():
            place = f"{path}.{number}.{key}"
            folded[place] = tensor if state is None else _scaled(state[place], silent[key], strength)
    return folded


def _scaled(weight: torch.Tensor, silent: float, strength: float) -> torch.Tensor:
    """Scale how far a weight is from the value with which the layer adds nothing."""
    return silent + (weight - silent) * strength


@torch.no_grad()
def _computes_the_same(layer: nn.Module, weights: Mapping[str, torch.Tensor], strength: float, call: Call) -> bool:
    """Run a layer with scaled output, and with scaled weights, and compare."""
    if len(call.streams) != 1:
        return False
    start, to = call.streams[0]
    bare = copy.deepcopy(layer).float().eval()
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    args, kwargs = _in_float((call.args, call.kwargs))
    entered = _at((args, kwargs), start).clone()
    added = _at(bare(*args, **kwargs), to) - entered
    for name, tensor in weights.items():
        bare.get_parameter(name).copy_(tensor)
    args, kwargs = _in_float((call.args, call.kwargs))
    found = _at(bare(*args, **kwargs), to) - entered
    return bool((found - strength * added).norm() <= _TOLERANCE * abs(strength) * added.norm())


def _at(value: Any, place: tuple[int | str, ...]) -> torch.Tensor:
    for key in place:
        value = value[key]
    found: torch.Tensor = value
    return found


def _in_float(value: Any) -> Any:
    """Copy nested tuples, lists and dictionaries, their floating point tensors in float32."""
    if isinstance(value, torch.Tensor):
        return value.float().clone() if value.is_floating_point() else value.clone()
    if type(value) is dict:
        return {key: _in_float(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_in_float(item) for item in value)
    return value
