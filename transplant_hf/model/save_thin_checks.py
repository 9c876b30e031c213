"""Whether a thin save can refer to the pinned recipient: its weights are unchanged, its configuration fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, apply_overrides, is_quantized, was_gguf
from ..architecture.names import is_adapted
from ..config import gguf_file_of
from ..display import some_of
from ..errors import CompatibilityError, ConfigurationError
from ..layer_map import RECIPIENT
from ..sources import HubOptions, at_revision, for_transformers, hub_errors, locate
from ..splice import Blueprint, draw_blueprint
from .layers_in_files import layers_in_files
from .recipient_in_model import changed, config_changes, differences


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
    missing = [name for name in _expected(model, recipient, state.blueprint, current) if name not in current]
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


def _expected(
    model: PreTrainedModel, pinned: PreTrainedModel, blueprint: Blueprint, current: Mapping[str, Any]
) -> Iterator[str]:
    """The names of the recipient's weights that a model holds, without layers that donors removed."""
    path = f"{blueprint.recipient.stack_path}."
    kept = {str(stage.slot.index) for stage in blueprint.built if stage.slot.source == RECIPIENT}
    # Weights that a state dict which was passed may hold under one of their names.
    pairs = [pair for pair in pinned.all_tied_weights_keys.items() if not current.keys().isdisjoint(pair)]
    tied = {name for pair in pairs for name in pair} & {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
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


def kept_overrides(model: Any) -> dict[str, Any]:
    """Return the fields in which the recipient's configuration in a model differs from the pinned recipient's."""
    blueprint = model._transplant.blueprint
    live = config_changes(model, blueprint)
    if live:
        _refuse_other_shapes(blueprint, changed(blueprint.recipient.config, live), live)
    pinned, path = _pinned_config(blueprint, model._transplant.hub)
    overrides = _merged(differences(pinned, blueprint.recipient.config), live)
    apply_overrides(copy.deepcopy(pinned), overrides)  # what a reload would refuse
    for name in reversed(path):
        overrides = {name: overrides} if overrides else {}
    return overrides


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(one) | {
        name: _merged(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }


def _pinned_config(blueprint: Blueprint, hub: HubOptions) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """Read the pinned recipient's configuration, and the path in its file to that of this model's class."""
    config, mine = blueprint.config, blueprint.recipient.config
    source = locate(config.recipient, files=("config.json",), revision=config.recipient_revision, hub=hub)
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


def _refuse_other_shapes(blueprint: Blueprint, config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    names = ", ".join(sorted(changes))
    recipient = blueprint.recipient
    donors = [(dataclasses.replace(part.spec, layers=None), part.donor) for part in blueprint.parts]
    try:
        built = Anatomy(recipient.model_class, config, recipient.what).model
        draw_blueprint(recipient.model_class, config, donors, blueprint.config, blueprint.keep_replaced)
    except CompatibilityError as error:
        raise ConfigurationError(
            f"model.config was changed after loading ({names}), and with that a thin save could not be loaded: {error}"
        ) from error
    wanted = {name: tensor.shape for name, tensor in recipient.model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in built.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ConfigurationError(
            f"model.config was changed after loading ({names}), and with that {wrong[0]} would have another shape "
            f"({found.get(wrong[0])}) than in the recipient ({wanted.get(wrong[0])}). Set it back, or save in full."
        )
