"""The recipient in a transplanted model: its weights and its configuration, under its own names and numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..architecture import apply_overrides
from ..architecture.recipient import NOT_SETTABLE
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice import Blueprint

# How a model is run, and what Transformers records: not part of what a model computes.
_RUNTIME = re.compile(
    r"dtype|torch_dtype|architectures|transformers_version|tokenizer_class|use_cache|output_\w+|\w*return_dict\w*|"
    r"\w*attn_implementation|\w*experts_implementation|use_kernels|torchscript|gradient_checkpointing|"
    + NOT_SETTABLE.pattern
)


def recipient_state(model: Any, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the recipient's weights in a transplanted model, under the recipient's own names.

    Layers that a donor replaced and that were not kept are absent.
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
                # A replaced layer that was kept does not run, and is not among the given weights.
                found = tensor if given is None else given.get(f"{place}{name}", tensor)
                yield f"{path}{stage.slot.index}.{name}", found


def live_recipient_config(model: Any, blueprint: Blueprint) -> PreTrainedConfig:
    """Return the recipient's configuration, with the fields that were set on the model's after loading."""
    return changed(blueprint.recipient.config, config_changes(model, blueprint))


def changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of a configuration with some fields changed."""
    copied = copy.deepcopy(config)
    apply_overrides(copied, changes)
    return copied


def config_changes(model: Any, blueprint: Blueprint) -> dict[str, Any]:
    """Return the fields that were set on the model's configuration after loading."""
    recipient, running = blueprint.recipient.config, blueprint.state(model._transplant.disabled).config
    changes = differences(running, model.config)
    spliced = _shared(changes, differences(recipient, running))
    if spliced:
        raise ConfigurationError(
            f"model.config.{spliced} was changed after loading. It describes all layers that run, donors included, so "
            "the recipient's own value is unknown. Set it back, or save in full."
        )
    return changes


def differences(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another's and change what a model computes."""
    old, new = before.to_dict(), after.to_dict()
    found: dict[str, Any] = {}
    for name, value in new.items():
        if _RUNTIME.fullmatch(name):
            continue
        # Not getattr, which refuses fields that differ from layer to layer.
        one, other = vars(before).get(name), vars(after).get(name)
        if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            inner = differences(one, other)
            if inner:
                found[name] = inner
        elif name not in old or old[name] != value:
            found[name] = value
    return found


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if not (isinstance(mine, dict) and isinstance(theirs, dict)):
            return name
        inner = _shared(mine, theirs)
        if inner is not None:
            return f"{name}.{inner}"
    return None
