"""What a transplanted model knows about itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architecture import decoder_stack
from ..layer_map import Stage
from ..splice import Blueprint, renumber, use_config
from .strength import scale_donor
from .switch import Switch

__all__ = ["TransplantState", "finish"]


@dataclasses.dataclass(eq=False)
class TransplantState:
    """A model's transplant.

    Args:
        blueprint: What runs, and what it was made of.
        layers: Every layer the model holds, running or not.
        switch: Turns donors off and on.
        local_only: Whether the model was loaded without asking the Hub.
        cache_dir: The download cache it was loaded with.
    """

    blueprint: Blueprint
    layers: dict[Stage, nn.Module]
    switch: Switch
    local_only: bool = False
    cache_dir: str | None = None


def finish(model: PreTrainedModel, blueprint: Blueprint, **where: Any) -> TransplantState:
    """Number inserted layers, set strengths, put kept layers aside, and give the model its state.

    Args:
        model: A model with all its layers and weights.
        blueprint: What it was built from.
        **where: How it was loaded.
    """
    stack = decoder_stack(model, blueprint.recipient.stack_path)
    if not blueprint.built_config.native:
        renumber(stack, blueprint.origins(blueprint.built))
        use_config(model, blueprint.recipient, blueprint.built_config)
    layers = dict(zip(blueprint.built, stack, strict=True))
    for part in blueprint.parts:
        own = [layer for stage, layer in layers.items() if stage.slot.source == part.name]
        scale_donor(own, part.spec.strength)
    state = TransplantState(blueprint, layers, Switch(model, blueprint, layers), **where)
    state.switch.settle()
    return state
