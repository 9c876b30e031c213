"""Save a transplanted model: full, thin, or full with layers that only transplant_hf can load."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..architecture import is_quantized
from ..donor.save import push_saved, refuse_recipients_place
from ..donor.saved_files import refuse_foreign_model, replaced_in
from ..errors import ConfigurationError
from ..splice import Blueprint
from ..storage import publish
from .card import write_full_card
from .folded_strength import folded_strengths
from .gates import gates_aside
from .layers_in_files import refuse_layers_in_files
from .save_arguments import PUSH_ARGS, by_name, checked_state, refuse_arguments
from .save_checkpoint import TrainerCheckpoint
from .save_parts import copy_model_companions, write_thin, write_with_recipient

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
    """Implement `save_pretrained`; `native` is that of the recipient's class."""
    state = model._transplant
    if not thin:
        refuse_layers_in_files(model, "save_pretrained")
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
    weights = kwargs.get("state_dict")
    if weights is not None:
        weights = kwargs["state_dict"] = dict(weights)  # Transformers empties it
    with state.calls.generation():
        state.check_stack()
        checkpoint = None if thin else TrainerCheckpoint.of(model, save_directory, weights)
        with gates_aside(state, weights):
            return _write_model(model, native, Path(save_directory), thin, kwargs, repo_id, checkpoint)


def _write_model(
    model: Any,
    native: Callable[..., Any],
    target: Path,
    thin: bool,
    kwargs: dict[str, Any],
    repo_id: str | None,
    checkpoint: TrainerCheckpoint | None,
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
        if state.disabled:
            off = ", ".join(sorted(state.disabled))
            raise ConfigurationError(f"donors are switched off here ({off}); save outside disable_transplants().")
        if is_main:
            kwargs["state_dict"] = checked_state(model, kwargs.get("state_dict"))
    folded = None
    # The weights of a checkpoint are loaded into a model that has the strength itself.
    if not (thin or native_format or checkpoint):
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
    refuse_recipients_place(blueprint.config.recipient, target, blueprint.config.recipient_revision, full=not thin)
    if thin:
        refuse_foreign_model(target)
    with publish(target, (lambda folder: ()) if variant else replaced_in) as staging:
        if thin:
            write_thin(model, staging, target, kwargs, repo_id, license)
            return None
        if native_format or folded is not None:
            if folded is not None:
                logger.info(f"The strength of {', '.join(blueprint.scaled)} is in the weights that are written.")
            native(staging, **kwargs)
            records = [part.donor.record for part in blueprint.parts]
        else:
            records = write_with_recipient(model, blueprint, staging, target, kwargs)
            if checkpoint is not None:
                checkpoint.write(staging)
        if not variant:  # a variant's weights are added to a model that has a tokenizer and a card
            copy_model_companions(state, staging, target)
        if not all_off and not variant:
            write_full_card(model, staging, target, records, repo_id, license)
    return None


def push_transplant(model: Any, native: Callable[..., Any], repo_id: str, thin: bool, kwargs: Mapping[str, Any]) -> Any:
    """Implement `push_to_hub`; `native` is `save_pretrained` of the recipient's class."""
    pushed = {name: kwargs[name] for name in PUSH_ARGS if name in kwargs}
    saved = {name: value for name, value in kwargs.items() if name not in pushed}
    known = {*inspect.signature(native).parameters, "license"} - {"save_directory", "push_to_hub", "kwargs"}
    unknown = [name for name in saved if name not in known]
    if unknown:
        raise ConfigurationError(
            f"push_to_hub does not accept {', '.join(unknown)}. It accepts {', '.join(PUSH_ARGS)}, and the arguments "
            f"of save_pretrained: {', '.join(sorted(known))}. Write tags into README.md."
        )
    message = pushed.pop("commit_message", None) or f"Upload {type(model).__name__} transplant"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repo_id.rpartition("/")[2]
        save_transplant(model, native, target, (), thin, saved, repo_id)
        return push_saved(target, repo_id, None, message, **pushed)


def _refuse_donors_place(blueprint: Blueprint, target: Path) -> None:
    """Refuse to replace the donors that the model was loaded from by a plain checkpoint: they would be lost."""
    for part in blueprint.parts:
        source = part.donor.source
        if source is not None and source.folder.resolve().is_relative_to(target.resolve()):
            raise ConfigurationError(
                f"{target} holds donor {part.name!r}, from which this model was loaded, and a full save would remove "
                "it. Choose another folder, or save with thin=True."
            )
