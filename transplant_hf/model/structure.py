"""The attributes of modules that depend on which layers run, such as layer numbers and the configuration.

They are found by comparison: a model with these layers is built on the meta device, and what differs from the model
without them is set on the live model. No weight is copied.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import decoder_stack
from ..architecture.anatomy import structural_attributes
from ..architecture.build import build_on_meta
from ..layer_map import RECIPIENT, Stage
from ..splice import Blueprint, insert_layers, renumber, use_config
from ..splice.surgery import outer_modules, set_differing

# By module path, then by attribute name.
Attributes = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The attributes of a model for one choice of running layers."""

    outer: Attributes  # of the modules outside the layers
    layers: Mapping[Stage, Attributes]  # of the modules inside each layer
    configs: Mapping[str, PreTrainedConfig]  # that modules outside the layers read, by module path

    def apply_outside(self, model: PreTrainedModel, stack_path: str, old: Structure) -> None:
        """Set what differs from the old structure on the modules outside the layers and on their configurations."""
        live = outer_modules(model, stack_path)
        for path, attributes in self.outer.items():
            if path in live:
                set_differing(live[path], old.outer.get(path, {}), attributes)
        for path, config in self.configs.items():
            if path in live and path in old.configs:
                _update_config(vars(live[path])["config"], old.configs[path], config)

    def apply_inside(self, layer: nn.Module, stage: Stage, old: Attributes) -> None:
        """Set what differs from the old attributes on the modules of one layer."""
        modules = dict(layer.named_modules())
        for path, attributes in self.layers[stage].items():
            if path in modules:
                set_differing(modules[path], old.get(path, {}), attributes)


def structure_of(blueprint: Blueprint, disabled: Collection[str] | None = ()) -> Structure:
    """Build a blueprint on the meta device and return its structure."""
    recipient, path = blueprint.recipient, blueprint.recipient.stack_path
    stages = blueprint.built if disabled is None else blueprint.running(disabled)
    spliced = blueprint.built_config if disabled is None else blueprint.state(disabled)
    model = build_on_meta(recipient.model_class, spliced.config if spliced.native else recipient.config)
    is_recipient = len(stages) == recipient.num_layers and all(stage.slot.source == RECIPIENT for stage in stages)
    if not spliced.native and not is_recipient:
        with torch.device("meta"):
            insert_layers(model, blueprint, stages)
        renumber(decoder_stack(model, path), blueprint.origins(stages))
        use_config(model, recipient, spliced)
    outer = outer_modules(model, path)
    layers = zip(stages, decoder_stack(model, path), strict=True)
    configs = {name: vars(module).get("config") for name, module in outer.items()}
    return Structure(
        {name: structural_attributes(module) for name, module in outer.items()},
        {stage: {name: structural_attributes(part) for name, part in layer.named_modules()} for stage, layer in layers},
        {name: config for name, config in configs.items() if isinstance(config, PreTrainedConfig)},
    )


def _update_config(live: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Set what differs between two configurations on the one that the live model reads."""
    if live.__class__ is not new.__class__ and old.__class__ is not new.__class__:
        live.__class__ = new.__class__
    for name in {*vars(old), *vars(new)}:
        before, after = vars(old).get(name), vars(new).get(name)
        if isinstance(before, PreTrainedConfig) or isinstance(after, PreTrainedConfig) or before == after:
            continue
        if name in vars(new):
            live.__dict__[name] = copy.deepcopy(after)
        else:
            live.__dict__.pop(name, None)
