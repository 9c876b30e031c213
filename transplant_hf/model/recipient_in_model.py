"""The recipient in a transplanted model, under its own names and numbers, and whether a thin save can refer to it.

It can if the recipient's weights are unchanged and its configuration fits. Weights that are quantized or offloaded
cannot be compared with the pinned recipient's; `AsLoaded` says whether they are as they were loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, apply_overrides, is_packed, is_quantized, quantization_fields, was_gguf
from ..architecture.names import is_adapted
from ..architecture.recipient import NOT_SETTABLE
from ..config import gguf_file_of, gguf_quantization
from ..display import some_of
from ..errors import CompatibilityError, ConfigurationError
from ..layer_map import RECIPIENT
from ..sources import at_revision, for_transformers, hub_errors, locate
from ..splice import Blueprint, draw_blueprint
from ..splice.quantized import SKIP_FIELDS
from ..splice.surgery import outer_modules
from .layers_in_files import layers_in_files, saved_tensors

# How a model is run, and what Transformers records: not part of what a model computes.
_RUNTIME = re.compile(
    r"dtype|torch_dtype|architectures|transformers_version|tokenizer_class|use_cache|output_\w+|\w*return_dict\w*|"
    r"\w*attn_implementation|\w*experts_implementation|use_kernels|torchscript|gradient_checkpointing|"
    + NOT_SETTABLE.pattern
)


def recipient_state(model: Any, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the recipient's weights in a transplanted model, without layers that were replaced and not kept."""
    path = f"{model._transplant.blueprint.recipient.stack_path}."
    own = model.state_dict() if given is None else given
    found = {name: tensor for name, tensor in own.items() if not name.startswith(path)}
    running = {slot: number for number, slot in enumerate(model.layer_map)}
    for stage, layer in model._transplant.layers.items():
        if stage.slot.source == RECIPIENT:
            # A replaced layer that was kept does not run, and is not among the model's weights.
            for name, tensor in layer.state_dict().items():
                found[f"{path}{stage.slot.index}.{name}"] = own.get(f"{path}{running.get(stage.slot)}.{name}", tensor)
    return found


def check_unchanged(model: Any, current: dict[str, torch.Tensor]) -> None:
    """Compare the recipient's weights with those of the pinned recipient, which is read again.

    Where they are quantized or offloaded, it is enough that they were loaded by name and not changed since.
    """
    state = model._transplant
    adapters = [name for name in current if is_adapted(name)]
    if adapters:
        raise ConfigurationError(
            f"a thin save holds only donors, but an adapter is attached ({adapters[0]}). Unload it and save it by "
            "itself, or merge it (merge_and_unload) and save in full."
        )
    if layers_in_files(model) is not None:
        return  # loaded by its name for one training, in which only donors change; the rest is not in memory
    if is_quantized(model) or any(tensor.is_meta for tensor in current.values()):
        how = "quantized" if is_quantized(model) else "offloaded"
        if state.as_loaded is None:
            raise ConfigurationError(
                f"a thin save compares the recipient's weights with the pinned recipient's, which is not possible for "
                f"{how} weights, and nothing is known of these: the recipient was in memory before its donors, or the "
                "model is a copy. Load it with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
            )
        state.as_loaded.refuse_changed(model)
        return
    recipient, config = _pinned_recipient(model), state.blueprint.config
    pinned = recipient.state_dict()
    where = at_revision(config.recipient, config.recipient_revision)
    missing = [name for name in _expected(model, recipient, current) if name not in current]
    if missing:
        raise ConfigurationError(
            f"a thin save would not keep what the model computes: it lacks recipient weights that {where} has, "
            f"{some_of(missing)}, and a reload would bring them back. Put the modules that hold them back."
        )
    changed = [name for name, tensor in current.items() if name not in pinned or not _equal(tensor, pinned[name])]
    if changed:
        raise ConfigurationError(
            f"a thin save would lose changed recipient weights: {some_of(changed)} differ from {where}. Save in full "
            "(save_pretrained(folder)), or train donor layers only."
        )


def _expected(model: Any, pinned: PreTrainedModel, current: Mapping[str, Any]) -> Iterator[str]:
    """The names of the recipient's weights that a model holds, without layers that donors removed."""
    blueprint = model._transplant.blueprint
    path = f"{blueprint.recipient.stack_path}."
    kept = {str(stage.slot.index) for stage in blueprint.built if stage.slot.source == RECIPIENT}
    # Weights that a state dict which was passed may hold under one of their names.
    pairs = [pair for pair in pinned.all_tied_weights_keys.items() if not current.keys().isdisjoint(pair)]
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = {name for pair in pairs for name in pair} & names
    for name in pinned.state_dict():
        removed = name.startswith(path) and name.removeprefix(path).partition(".")[0] not in kept
        if not removed and name not in tied:
            yield name


def _equal(tensor: torch.Tensor, pinned: torch.Tensor) -> bool:
    if tensor.shape != pinned.shape:
        return False
    wider = torch.promote_types(tensor.dtype, pinned.dtype)  # rounding would hide a small change
    return torch.equal(tensor.detach().to("cpu", wider), pinned.to(wider))


def _pinned_recipient(model: Any) -> PreTrainedModel:
    from .surface import transplant_class  # imports this module; a class that loads for this thread only

    state = model._transplant
    recipient, config = state.blueprint.recipient, state.blueprint.config
    gguf_file = gguf_file_of(config)
    if was_gguf(model) and gguf_file is None:
        raise ConfigurationError(
            f"a thin save names its recipient, and the GGUF file that the weights of {config.recipient} were read from "
            "is not known: the recipient was in memory before its donors. Load it with "
            "AutoModelWithTransplant.from_pretrained(recipient, gguf_file=..., donors=...), or save in full."
        )
    with hub_errors(config.recipient, config.recipient_revision):
        loaded: Any = transplant_class(recipient.model_class).from_pretrained(
            for_transformers(config.recipient, config.recipient_revision, state.hub, weights=True, file=gguf_file),
            revision=config.recipient_revision or "main",
            config=copy.deepcopy(recipient.config),
            dtype=model.dtype,
            output_loading_info=True,
            **state.hub.as_kwargs(),
            **({} if gguf_file is None else {"gguf_file": gguf_file}),
        )
    pinned, info = loaded
    for name in info["missing_keys"]:
        # Not in the recipient's files, and random now: a reload would lose what the model holds.
        pinned.get_parameter_or_buffer(name).data.fill_(torch.nan)
    return pinned


class AsLoaded:
    """The weights of a recipient when they were loaded by its name; a copy of the model has others."""

    def __init__(self, model: Any) -> None:
        # By identity: torch does not move packed tensors that have weak references.
        self._seen = {
            name: (id(tensor), _version(tensor), _place(tensor))
            for name, tensor in _recipient_weights(model)
            if not tensor.is_meta  # offloaded: what is in its file is what was loaded
        }

    def __reduce__(self) -> Any:
        return (type(None), ())

    def refuse_changed(self, model: Any) -> None:
        """Refuse a model whose recipient was changed, as far as that can be seen."""
        for name, tensor in _recipient_weights(model):
            if name not in self._seen:
                continue
            (identity, version, before), place = self._seen[name], _place(tensor)
            reason = None
            if tensor.grad is not None:
                reason = "has a gradient: it is being trained"
            elif not tensor.is_meta and identity != id(tensor):
                reason = "is another tensor than the one that was loaded"
            elif not tensor.is_meta and _version(tensor) != version:
                reason = "was changed in place after loading"
            elif place and before and place[1:] == before[1:] and place != before:
                reason = "holds other numbers than those that were loaded"
            elif place and before and place[2] != before[2]:
                reason = f"was {before[2]} when it was loaded, and is {place[2]} now"
            if reason is not None:
                raise ConfigurationError(
                    f"a thin save would lose changed recipient weights: {name} {reason}. Train donor layers only, or "
                    "load the model again."
                )


def _recipient_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the recipient's parameters and the buffers that are in checkpoints, under its own names."""
    state = model._transplant
    path = state.blueprint.recipient.stack_path
    modules: list[tuple[str, nn.Module]] = list(outer_modules(model, path).items())
    for stage, layer in state.layers.items():
        if stage.slot.source == RECIPIENT:
            modules += [(f"{path}.{stage.slot.index}.{name}".rstrip("."), part) for name, part in layer.named_modules()]
    for name, module in modules:
        for key, tensor in saved_tensors(module):
            yield f"{name}.{key}" if name else key, tensor


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_meta or tensor.is_inference() or is_packed(tensor) else tensor._version


def _place(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    # Packed weights have their own layouts, which their library may change.
    return None if tensor.is_meta or is_packed(tensor) else (tensor.data_ptr(), tensor.device, tensor.dtype)


def quantization_of_recipient(model: Any) -> dict[str, Any] | None:
    """Return how a recipient was quantized while it was loaded, as JSON; `None` if it was not.

    Modules that were not quantized are listed by the recipient's own names, and the donors that were.
    """
    blueprint = model._transplant.blueprint
    file = gguf_file_of(blueprint.config)
    if file is not None:
        return gguf_quantization(file)
    if not is_quantized(model) or getattr(blueprint.recipient.config, "quantization_config", None) is not None:
        return None
    fields = dict(quantization_fields(model) or {})
    path = blueprint.recipient.stack_path
    plain = [name for name, module in outer_modules(model, path).items() if _is_plain_linear(module)]
    donors = set()
    for stage, layer in model._transplant.layers.items():
        linear = {name: part for name, part in layer.named_modules() if _is_linear(part)}
        unpacked = [name for name, part in linear.items() if _is_plain_linear(part)]
        if stage.slot.source == RECIPIENT:
            start = f"{path}.{stage.slot.index}"
            plain += [start] if len(unpacked) == len(linear) else [f"{start}.{name}" for name in unpacked]
        elif len(unpacked) < len(linear):
            donors.add(stage.slot.source)
    field = next((name for name in SKIP_FIELDS if name in fields), SKIP_FIELDS[0])
    return {"config": {**fields, field: plain}, "donors": sorted(donors)}


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")


def _is_plain_linear(module: nn.Module) -> bool:
    return _is_linear(module) and not is_packed(module._parameters["weight"])  # type: ignore[arg-type]


# -- Configuration -----------------------------------------------------------------------------------------------------


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of a configuration with some fields changed."""
    copied = copy.deepcopy(config)
    apply_overrides(copied, changes)
    return copied


def live_config(model: Any) -> PreTrainedConfig:
    """Return the recipient's configuration, with the fields that were set on the model's after loading."""
    return _changed(model._transplant.blueprint.recipient.config, _config_changes(model))


def _config_changes(model: Any) -> dict[str, Any]:
    """Return the fields that were set on the model's configuration after loading."""
    blueprint = model._transplant.blueprint
    recipient, running = blueprint.recipient.config, blueprint.state(model._transplant.disabled).config
    changes = _differences(running, model.config)
    spliced = _shared(changes, _differences(recipient, running))
    if spliced:
        raise ConfigurationError(
            f"model.config.{spliced} was changed after loading. It describes all layers that run, donors included, so "
            "the recipient's own value is unknown. Set it back, or save in full."
        )
    return changes


def _differences(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another's and change what a model computes."""
    old, new = before.to_dict(), after.to_dict()
    found: dict[str, Any] = {}
    for name, value in new.items():
        if _RUNTIME.fullmatch(name):
            continue
        # Not getattr, which refuses fields that differ from layer to layer.
        one, other = vars(before).get(name), vars(after).get(name)
        if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            if inner := _differences(one, other):
                found[name] = inner
        elif name not in old or old[name] != value:
            found[name] = value
    return found


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The path of a field that is in both."""
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if not (isinstance(mine, dict) and isinstance(theirs, dict)):
            return name
        if inner := _shared(mine, theirs):
            return f"{name}.{inner}"
    return None


def kept_overrides(model: Any) -> dict[str, Any]:
    """Return the fields in which the recipient's configuration in a model differs from the pinned recipient's."""
    blueprint = model._transplant.blueprint
    live = _config_changes(model)
    if live:
        _refuse_other_shapes(blueprint, live)
    pinned, path = _pinned_config(model)
    overrides = _merged(_differences(pinned, blueprint.recipient.config), live)
    _changed(pinned, overrides)  # what a reload would refuse
    for name in reversed(path):
        overrides = {name: overrides} if overrides else {}
    return overrides


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(one) | {
        name: _merged(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }


def _pinned_config(model: Any) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """Read the pinned recipient's configuration, and the path in its file to that of this model's class."""
    state = model._transplant
    config, mine = state.blueprint.config, state.blueprint.recipient.config
    source = locate(config.recipient, files=("config.json",), revision=config.recipient_revision, hub=state.hub)
    if not (source.folder / "config.json").exists():  # a GGUF file
        return mine, ()
    kind = type(mine)
    fields, _ = kind.get_config_dict(source.folder)  # which also decodes infinite numbers
    if fields.get("model_type") == kind.model_type:
        return kind.from_dict(fields), ()
    for name, part in fields.items():
        if isinstance(part, dict) and part.get("model_type", kind.base_config_key) in (kind.model_type, name):
            return kind.from_dict(part), (name,)
    raise ConfigurationError(f"{source} is now a model of type {fields.get('model_type')!r}, not {kind.model_type!r}.")


def _refuse_other_shapes(blueprint: Blueprint, changes: Mapping[str, Any]) -> None:
    """Refuse changes of the configuration with which the model could not be loaded."""
    recipient, config = blueprint.recipient, _changed(blueprint.recipient.config, changes)
    start = f"model.config was changed after loading ({', '.join(sorted(changes))}), and with that"
    donors = [(dataclasses.replace(part.spec, layers=None), part.donor) for part in blueprint.parts]
    try:
        built = Anatomy(recipient.model_class, config, recipient.what).model
        draw_blueprint(recipient.model_class, config, donors, blueprint.config, blueprint.keep_replaced)
    except CompatibilityError as error:
        raise ConfigurationError(f"{start} a thin save could not be loaded: {error}") from error
    wanted = {name: tensor.shape for name, tensor in recipient.model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in built.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ConfigurationError(
            f"{start} {wrong[0]} would have another shape ({found.get(wrong[0])}) than in the recipient "
            f"({wanted.get(wrong[0])}). Set it back, or save in full."
        )
