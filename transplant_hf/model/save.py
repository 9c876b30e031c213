"""Save a transplanted model: full, thin, or full with layers that only transplant_hf can load."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors.torch import save_file
from transformers.utils import logging

from ..architecture import is_quantized
from ..donor.save import push_saved, refuse_recipients_place
from ..donor.saved_files import refuse_foreign_model, replaced_in
from ..errors import ConfigurationError
from ..storage import publish, write_json
from .layers_in_files import layers_in_files
from .save_parts import copy_model_companions, folded_strengths, write_full_card, write_thin, write_with_recipient
from .strength import gates_aside

logger = logging.get_logger(__name__)

_PUSH_ARGS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
# Where Transformers does not write the files, each argument of `save_pretrained` is honored or refused.
_HONORED = ("is_main_process", "max_shard_size", "save_original_format", "save_peft_format", "state_dict", "token")
# What else Transformers knows or knew: the values that ask for nothing else than what is done, and what to do instead.
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys((*_PUSH_ARGS, "repo_id"), ((None, False), "it goes with push_to_hub=True")),
    "variant": ((None,), "a variant is a weight file of a plain checkpoint. Save into a folder of its own instead"),
    "distributed_checkpoint": ((None, False), "pass state_dict= with gathered weights instead"),
    "safe_serialization": ((None, True), "weights are always written as safetensors"),
    "save_function": ((None,), "weights are always written as safetensors; is_main_process= says who writes"),
}
# Their functions for `save_function` let the main process alone write, as `is_main_process` does.
_KNOWN_WRITERS = ("accelerate", "torch", "torch_xla")

# `Trainer` loads the weights at the root of its checkpoint into the running model, under the names of that model. The
# transplant format stores recipient and donors under their own names, so a checkpoint holds these weights as well.
_TRAINERS_FOLDER = re.compile(r"checkpoint-\d+")
_TRAINERS_WEIGHTS, _TRAINERS_INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"


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
    held = layers_in_files(model)
    if held is not None and not thin:
        raise ConfigurationError(
            f"save_pretrained needs all weights, and layers 0..{held.count - 1} of this model stayed in their files "
            "(stream_prefix). Save the donor, and load it with its recipient."
        )
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    if thin and (state is None or not state.blueprint.parts):
        raise ConfigurationError("thin=True saves donors, but this model holds no transplant.")
    if state is None or (adapters_only and not thin):
        return native(save_directory, *args, **kwargs)
    parameters = list(inspect.signature(native).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    positional = dict(zip(names, args, strict=False))
    twice = [name for name in positional if name in kwargs]
    if twice or len(args) > len(names):
        wrong = f"{twice[0]!r} is given twice" if twice else f"{len(args) + 1} positional arguments are too many"
        raise ConfigurationError(f"save_pretrained: {wrong}. Pass arguments by name: {', '.join(names)}.")
    kwargs = {**positional, **kwargs}
    if kwargs.pop("push_to_hub", False):
        target = kwargs.pop("repo_id", None) or Path(save_directory).name
        pushed = {name: kwargs.pop(name) for name in _PUSH_ARGS if name in kwargs}
        save_transplant(model, native, save_directory, (), thin, kwargs, target)
        if not kwargs.get("is_main_process", True):
            return None
        return push_transplant(model, native, target, thin, {**kwargs, **pushed})
    weights = kwargs.get("state_dict")
    if weights is not None:
        weights = kwargs["state_dict"] = dict(weights)  # Transformers empties it
    with state.calls.generation():
        state.check_stack()
        checkpoint = None if thin else _trainer_weights(model, save_directory, weights)
        with gates_aside(state, weights):
            return _write_model(model, native, Path(save_directory), thin, kwargs, repo_id, checkpoint)


def _write_model(
    model: Any,
    native: Callable[..., Any],
    target: Path,
    thin: bool,
    kwargs: dict[str, Any],
    repo_id: str | None,
    checkpoint: Mapping[str, torch.Tensor | None] | None,
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
    plain = not thin and (blueprint.native or all_off)
    if not plain:
        if state.disabled:
            off = ", ".join(sorted(state.disabled))
            raise ConfigurationError(f"donors are switched off here ({off}); save outside disable_transplants().")
        if is_main:
            kwargs["state_dict"] = _checked_state(model, kwargs.get("state_dict"))
            if not thin and kwargs["state_dict"] is None and any(one.is_meta for one in model.parameters()):
                kwargs["state_dict"] = get_state_dict_offloaded_model(model)
        # The weights of a checkpoint are loaded into a model that has the strength itself.
        folded = None
        if not (thin or checkpoint):
            folded = folded_strengths(model, kwargs.get("state_dict") if is_main else None)
        if folded is None:
            _refuse_arguments("A thin transplant" if thin else "A model in the transplant format", kwargs)
            if not is_main:
                return None
        else:
            scaled, plain = ", ".join(blueprint.scaled), True
            if kwargs.get("distributed_checkpoint"):
                raise ConfigurationError(
                    f"distributed_checkpoint=True writes the weights as they are, and the strength of {scaled} would "
                    "be lost. Leave it out, or set the strengths to 1."
                )
            own = model.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
            kwargs["state_dict"] = {**own, **folded}
            logger.info(f"The strength of {scaled} is in the weights that are written.")
    if not is_main or kwargs.get("distributed_checkpoint"):
        return native(target, **kwargs)
    variant = kwargs.get("variant")
    for part in blueprint.parts if plain else ():
        source = part.donor.source
        if source is not None and source.folder.resolve().is_relative_to(target.resolve()):
            raise ConfigurationError(
                f"{target} holds donor {part.name!r}, from which this model was loaded, and a full save would remove "
                "it. Choose another folder, or save with thin=True."
            )
    refuse_recipients_place(blueprint.config.recipient, target, blueprint.config.recipient_revision, full=not thin)
    if thin:
        refuse_foreign_model(target)
    with publish(target, (lambda folder: ()) if variant else replaced_in) as staging:
        if thin:
            write_thin(model, staging, target, kwargs, repo_id, license)
            return None
        if plain:
            native(staging, **kwargs)
            records = [part.donor.record for part in blueprint.parts]
        else:
            records = write_with_recipient(model, staging, target, kwargs)
            if checkpoint is not None:
                _write_trainer_weights(checkpoint, staging)
        if not variant:  # a variant's weights are added to a model that has a tokenizer and a card
            copy_model_companions(state, staging, target)
            if not all_off:
                write_full_card(model, staging, target, records, repo_id, license)
    return None


def push_transplant(model: Any, native: Callable[..., Any], repo_id: str, thin: bool, kwargs: Mapping[str, Any]) -> Any:
    """Implement `push_to_hub`; `native` is `save_pretrained` of the recipient's class."""
    pushed = {name: kwargs[name] for name in _PUSH_ARGS if name in kwargs}
    saved = {name: value for name, value in kwargs.items() if name not in pushed}
    known = {*inspect.signature(native).parameters, "license"} - {"save_directory", "push_to_hub", "kwargs"}
    unknown = [name for name in saved if name not in known]
    if unknown:
        raise ConfigurationError(
            f"push_to_hub does not accept {', '.join(unknown)}. It accepts {', '.join(_PUSH_ARGS)}, and the arguments "
            f"of save_pretrained: {', '.join(sorted(known))}. Write tags into README.md."
        )
    message = pushed.pop("commit_message", None) or f"Upload {type(model).__name__} transplant"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repo_id.rpartition("/")[2]
        save_transplant(model, native, target, (), thin, saved, repo_id)
        return push_saved(target, repo_id, None, message, **pushed)


def _refuse_arguments(what: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a save that Transformers does not write cannot honor."""
    wrong = []
    for name, value in kwargs.items():
        allowed, advice = _FIXED.get(name, ((), ""))
        module = str(getattr(value, "__module__", "")).partition(".")[0]
        if name in _HONORED or any(value is one for one in allowed):
            continue
        if name == "save_function" and module in _KNOWN_WRITERS:
            continue
        if not advice:
            close = difflib.get_close_matches(name, (*_HONORED, *_FIXED), 1)
            advice = f"there is no such argument{f' (is {close[0]} meant?)' if close else ''}"
        wrong.append(f"{name}={value!r}: {advice}")
    if wrong:
        raise ConfigurationError(f"{what} cannot be saved with {'; '.join(wrong)}.")


def _checked_state(model: Any, given: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """Return the whole `state_dict=` of a save; tied weights may be in it once."""
    if given is None:
        return None
    own: dict[str, torch.Tensor] = model.state_dict()
    lacking = [name for name in own if name not in given]
    twins = {tensor.data_ptr(): name for name, tensor in own.items() if name in given} if lacking else {}
    twins.pop(0, None)  # without memory
    state = {**given, **{name: given[twins[own[name].data_ptr()]] for name in lacking if own[name].data_ptr() in twins}}
    wrong = [f"{name} is no tensor of it" for name in state if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in state]
    wrong += [
        f"{name} has another shape ({list(state[name].shape)}, not {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and tensor.numel() and state[name].shape != tensor.shape
    ]
    if wrong:
        rest = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConfigurationError(
            f"state_dict= is not this {type(model).__name__}'s: {wrong[0]}{rest}. Pass what model.state_dict() of this "
            "very model has, gathered and without the prefixes of wrappers."
        )
    return state


def _trainer_weights(
    model: Any, folder: str | os.PathLike[str], state: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor | None] | None:
    """Return the trained weights and the buffers by name, `None` for others; `None` for a folder of another name."""
    if not _TRAINERS_FOLDER.fullmatch(Path(folder).name):
        return None
    own: Mapping[str, torch.Tensor] = model.state_dict() if state is None else state
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Of tied weights, the first.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name in own if (name in trained or name not in parameters) and not own[name].is_meta}
    return {name: tensor if name in wanted else None for name, tensor in own.items()}


def _write_trainer_weights(weights: Mapping[str, torch.Tensor | None], staging: Path) -> None:
    """Write the weights where `Trainer` looks.

    Frozen weights do not change in training and are not written again. The index lists them, or `Trainer` would warn
    that they are missing.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items() if tensor is not None}
    save_file(tensors, staging / _TRAINERS_WEIGHTS, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(weights, _TRAINERS_WEIGHTS)}
    write_json(staging / _TRAINERS_INDEX, index)
