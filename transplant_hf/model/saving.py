"""Save a transplanted model: full, thin, or full with layers that only transplant_hf can load."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..architecture import is_quantized
from ..architecture.build import build_on_meta
from ..cards import DONOR_TEMPLATE, render_card, write_card
from ..config import DonorSpec, TransplantConfig
from ..donor.companions import at_hand, copy_companions, has_tokenizer, kept_in_repository, tokenizer_class
from ..donor.entry import write_entry
from ..donor.extract import checkpoint_tensors
from ..donor.record import DonorRecord
from ..donor.save import (
    donor_folders,
    refuse_recipients_place,
    vocabulary_of,
    write_donor,
    written_reference,
)
from ..donor.saved_files import RECIPIENT_FOLDER, foreign_names, replaced_among, replaced_in
from ..donor.tensors import MemoryTensors
from ..errors import ConfigurationError
from ..hub import push_folder
from ..layer_map import RECIPIENT
from ..sources import HubOptions
from ..splice import Blueprint
from ..storage import publish
from .card import write_full_card
from .folded_strength import folded_strengths
from .gates import gates_aside
from .overrides import kept_overrides, live_recipient_config
from .resumable import Resumable
from .save_args import PUSH_ARGS, by_name, checked_state, refuse_arguments
from .unchanged import check_unchanged

__all__ = ["push_transplant", "recipient_state", "save_transplant"]

logger = logging.get_logger(__name__)


def save_transplant(
    model: Any,
    native: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    args: tuple[Any, ...],
    thin: bool,
    kwargs: dict[str, Any],
    repo_id: str | None = None,
) -> Any:
    """Do the work of `save_pretrained`; `native` is the recipient class's own."""
    state = model._transplant
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    if thin and (state is None or not state.blueprint.parts):
        raise ConfigurationError("thin=True saves donors, but this model holds no transplant.")
    if state is None or (adapters_only and not thin):
        return native(save_directory, *args, **kwargs)
    kwargs = by_name(native, args, kwargs)
    if kwargs.pop("push_to_hub", False):
        target = kwargs.pop("repo_id", None) or Path(save_directory).name
        pushed = {name: kwargs.pop(name) for name in PUSH_ARGS if name in kwargs}
        save_transplant(model, native, save_directory, (), thin, kwargs, target)
        if not kwargs.get("is_main_process", True):
            return None
        return push_transplant(model, native, target, thin, {**kwargs, **pushed})
    given = kwargs.get("state_dict")
    if given is not None:
        given = kwargs["state_dict"] = dict(given)  # what is written is taken out of it
    with state.calls.generation():
        state.check_stack()
        resumable = None if thin else Resumable.of(model, save_directory, given)
        with gates_aside(state, given):
            return _write_model(model, native, Path(save_directory), thin, kwargs, repo_id, resumable)


def _write_model(
    model: Any,
    native: Callable[..., Any],
    target: Path,
    thin: bool,
    kwargs: dict[str, Any],
    repo_id: str | None,
    resumable: Resumable | None,
) -> Any:
    state = model._transplant
    blueprint = state.blueprint
    if not thin and is_quantized(model) and not model.hf_quantizer.is_serializable():
        method = model.hf_quantizer.quantization_config.quant_method
        raise ConfigurationError(
            f"the weights of this model are quantized by {getattr(method, 'value', method)} in a way that Transformers "
            "cannot write. Load the recipient without quantization to save it."
        )
    license = kwargs.pop("license", None)
    is_main = kwargs.get("is_main_process", True)
    all_off = state.disabled == set(blueprint.splice.names)
    native_format = not thin and (blueprint.native or all_off)
    if not native_format:
        _refuse_unless_all_on(blueprint, state.disabled)
        if is_main:
            kwargs["state_dict"] = checked_state(model, kwargs.get("state_dict"))
    folded = None
    # The weights of a checkpoint go back into a model that has the strength itself.
    if not (thin or native_format or resumable):
        folded = folded_strengths(model, blueprint, kwargs.get("state_dict") if is_main else None)
    if folded is not None:
        if kwargs.get("distributed_checkpoint"):
            raise ConfigurationError(
                f"distributed_checkpoint=True writes the weights as they are, and the strength of "
                f"{', '.join(blueprint.scaled)} would be lost. Leave it out, or set the strengths to 1."
            )
        own = model.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
        kwargs["state_dict"] = {**own, **folded}
    elif not native_format:
        refuse_arguments("A thin transplant" if thin else "A model in the transplant format", kwargs)
        if not is_main:
            return None
    if not is_main or kwargs.get("distributed_checkpoint"):
        return native(target, **kwargs)
    variant = kwargs.get("variant")
    if native_format or folded is not None:
        _refuse_donors_place(blueprint, target)
    if thin:
        refuse_recipients_place(blueprint.config.recipient, target, blueprint.config.recipient_revision)
    with publish(target, (lambda folder: ()) if variant else replaced_in) as staging:
        if thin:
            _write_thin(model, state, staging, target, kwargs, repo_id, license)
            return None
        if native_format or folded is not None:
            if folded is not None:
                logger.info(f"The strength of {', '.join(blueprint.scaled)} is in the weights that are written.")
            native(staging, **kwargs)
            records = [part.donor.record for part in blueprint.parts]
        else:
            records = _write_full(model, blueprint, staging, target, kwargs)
            if resumable is not None:
                resumable.write(staging)
        if not variant:  # a variant's weights stand beside a model that has its tokenizer and its card
            _copy_companions(state, staging, target)
        if not all_off and not variant:
            write_full_card(model, staging, target, records, repo_id, license)
    return None


def push_transplant(model: Any, native: Callable[..., Any], repo_id: str, thin: bool, kwargs: Mapping[str, Any]) -> Any:
    """Upload a model with a transplant; `native` is the recipient class's own `save_pretrained`.

    Raises:
        ConfigurationError: Arguments that neither a push nor a save takes.
    """
    pushed = {name: kwargs[name] for name in PUSH_ARGS if name in kwargs}
    saved = {name: value for name, value in kwargs.items() if name not in pushed}
    known = {*inspect.signature(native).parameters, "license"} - {"save_directory", "push_to_hub", "kwargs"}
    unknown = [name for name in saved if name not in known]
    if unknown:
        raise ConfigurationError(
            f"push_to_hub takes no {', '.join(unknown)} here. It takes {', '.join(PUSH_ARGS)}, and what "
            f"save_pretrained takes: {', '.join(sorted(known))}. Tags belong into README.md."
        )
    message = pushed.pop("commit_message", None) or f"Upload {type(model).__name__} transplant"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repo_id.rpartition("/")[2]
        save_transplant(model, native, target, (), thin, saved, repo_id)
        kept = functools.partial(kept_in_repository, target)
        return push_folder(target, repo_id, commit_message=message, replaced=replaced_among, kept=kept, **pushed)


def _refuse_donors_place(blueprint: Blueprint, target: Path) -> None:
    """Refuse to write a plain checkpoint over the donors that the model was loaded from, which would then be gone."""
    for part in blueprint.parts:
        source = part.donor.source
        if source is not None and source.folder.resolve().is_relative_to(target.resolve()):
            raise ConfigurationError(
                f"{target} holds donor {part.name!r}, from which this model was loaded, and a full save would remove "
                "it. Choose another folder, or save with thin=True."
            )


def _refuse_unless_all_on(blueprint: Blueprint, disabled: frozenset[str]) -> None:
    if disabled:
        raise ConfigurationError(
            f"donors are switched off here ({', '.join(sorted(disabled))}); save outside disable_transplants()."
        )


def _write_thin(
    model: PreTrainedModel,
    state: Any,
    staging: Path,
    target: Path,
    kwargs: Mapping[str, Any],
    repo_id: str | None,
    license: str | None,
) -> None:
    blueprint = state.blueprint
    config = blueprint.config
    if not config.recipient:
        raise ConfigurationError(
            "a thin save refers to its recipient, but this model's recipient was not loaded by name. Save it in full, "
            "or load it with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    check_unchanged(model, state, recipient_state(model, kwargs.get("state_dict")))
    hub = HubOptions(cache_dir=state.cache_dir, local_files_only=state.local_only)
    overrides = kept_overrides(model, blueprint, hub)
    folders = donor_folders(blueprint.splice.names, foreign_names(target))
    records = _write_donors(model, blueprint, folders, staging, kwargs)
    recipient = _reference(config, target)
    specs = [
        dataclasses.replace(part.spec, donor=".", subfolder=folder, revision=None, layers=None, name=part.name)
        for part, folder in zip(blueprint.parts, folders, strict=True)
    ]
    saved = TransplantConfig(
        recipient=recipient,
        recipient_revision=config.recipient_revision,
        donors=specs,
        composition=config.composition,
        recipient_overrides=overrides,
        vocab_size=vocabulary_of(blueprint.recipient.config.to_dict()),
    )
    _write_companions(model, staging, target)
    saved.tokenizer_class = tokenizer_class(blueprint.recipient.config.model_type, staging)
    write_entry(staging, saved)
    card = render_card(
        DONOR_TEMPLATE,
        repo_id or target.absolute().name,
        saved,
        records,
        blueprint.layer_map(),
        recipient_files=at_hand(config.recipient, config.recipient_revision, state.cache_dir),
        license=license,
        with_tokenizer=has_tokenizer(staging),
    )
    write_card(card, staging, target)


def _reference(config: TransplantConfig, target: Path) -> str:
    return written_reference(config.recipient, target, config.recipient_revision)


def _write_companions(model: Any, staging: Path, target: Path) -> None:
    if model.can_generate():
        model.generation_config.save_pretrained(staging)
    _copy_companions(model._transplant, staging, target)


def _copy_companions(state: Any, staging: Path, target: Path) -> None:
    config = state.blueprint.config
    sources = [(config.name_or_path, None), (config.recipient, config.recipient_revision)]
    copy_companions(sources, staging, target, state.cache_dir)


def _write_donors(
    model: PreTrainedModel,
    blueprint: Blueprint,
    folders: Sequence[str | None],
    staging: Path,
    kwargs: Mapping[str, Any],
) -> list[DonorRecord]:
    records = []
    layer_map = blueprint.layer_map()
    for part, folder in zip(blueprint.parts, folders, strict=True):
        place = staging / folder if folder else staging
        place.mkdir(parents=True, exist_ok=True)
        numbers = layer_map.layers_of(part.name)
        state_dict = kwargs.get("state_dict")
        tensors = checkpoint_tensors(model, blueprint.recipient.stack_path, numbers, state_dict=state_dict)
        record = dataclasses.replace(part.donor.record, name=part.name)
        records.append(write_donor(place, record, MemoryTensors(tensors), kwargs.get("max_shard_size", "5GB")))
    return records


def _write_full(
    model: Any, blueprint: Blueprint, staging: Path, target: Path, kwargs: dict[str, Any]
) -> list[DonorRecord]:
    """Write the recipient and the donors side by side, for layers that no native configuration can describe."""
    foreign = foreign_names(target)
    if RECIPIENT_FOLDER in foreign:
        raise ConfigurationError(
            f"{target / RECIPIENT_FOLDER} exists, and transplant_hf has no record of writing it: a save in the "
            "transplant format writes its recipient under that name. Choose another folder, or rename this one."
        )
    folders = donor_folders(blueprint.splice.names, foreign)
    reason = "; ".join(blueprint.state(()).reasons[:2] or blueprint.beyond_native)
    logger.warning(
        f"No plain {type(model).__name__} checkpoint can describe these layers ({reason}): the folder is written in "
        "the transplant format, and loading it needs transplant_hf."
    )
    save_args = {name: value for name, value in kwargs.items() if name in ("max_shard_size", "save_original_format")}
    shell = _shell(model, blueprint)
    recipients = recipient_state(model, kwargs.get("state_dict"))
    shell.save_pretrained(staging / RECIPIENT_FOLDER, state_dict=recipients, **save_args)
    records = _write_donors(model, blueprint, folders, staging, kwargs)
    specs = [
        DonorSpec(
            ".", part.spec.position, part.spec.mode, subfolder=folder, name=part.name, strength=part.spec.strength
        )
        for part, folder in zip(blueprint.parts, folders, strict=True)
    ]
    saved = TransplantConfig(
        recipient=f"./{RECIPIENT_FOLDER}",
        donors=specs,
        composition=blueprint.config.composition,
        vocab_size=vocabulary_of(blueprint.recipient.config.to_dict()),
    )
    _write_companions(model, staging, target)
    saved.tokenizer_class = tokenizer_class(blueprint.recipient.config.model_type, staging)
    write_entry(staging, saved)
    return records


def _shell(model: PreTrainedModel, blueprint: Blueprint) -> PreTrainedModel:
    """A recipient without memory, to save the recipient's weights through."""
    config = live_recipient_config(model, blueprint)
    config.dtype = model.dtype
    shell = build_on_meta(blueprint.recipient.model_class, config)
    shell.tie_weights()
    if hasattr(model, "_weight_conversions"):
        shell._weight_conversions = model._weight_conversions
    if model.can_generate():
        shell.generation_config = model.generation_config
    return shell


def recipient_state(model: Any, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the recipient's weights in a transplanted model, under the recipient's own names.

    Layers that a donor replaced and that were not kept are absent.

    Args:
        model: The model.
        given: Its weights, if others are meant than it holds.
    """
    state = model._transplant
    path = f"{state.blueprint.recipient.stack_path}."
    own = model.state_dict() if given is None else given
    outer = {name: tensor for name, tensor in own.items() if not name.startswith(path)}
    return {**outer, **dict(_recipient_layers(model, path, given))}


def _recipient_layers(
    model: Any, path: str, given: Mapping[str, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    running = {slot: number for number, slot in enumerate(model.layer_map)}
    for stage, layer in model._transplant.layers.items():
        if stage.slot.source == RECIPIENT:
            place = f"{path}{running.get(stage.slot)}."
            for name, tensor in layer.state_dict().items():
                # One that a donor replaced, and that was kept, does not run.
                meant = tensor if given is None else given.get(f"{place}{name}", tensor)
                yield f"{path}{stage.slot.index}.{name}", meant
