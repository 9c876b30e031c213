"""Insert layers into a built model, if no native configuration can build it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, LayerOrigin, decoder_stack, text_config
from ..architecture.anatomy import is_layer_number, plain, structural_attributes
from ..architecture.build import build_on_meta, inner_models
from ..architecture.follow import RUNTIME
from ..architecture.native import SplicedConfig
from ..errors import BUILD_ERRORS
from ..layer_map import RECIPIENT, Stage
from .blueprint import Blueprint


def insert_layers(model: PreTrainedModel, blueprint: Blueprint, stages: Sequence[Stage]) -> None:
    """Insert the donors' layers into a model that was just built from the recipient's configuration.

    The layers keep the numbers they were built with until `renumber`: buffers that depend on a layer's number are
    computed when the weights are loaded.
    """
    stack = decoder_stack(model, blueprint.recipient.stack_path)
    sources: dict[str, Sequence[nn.Module]] = {RECIPIENT: list(stack)}
    for part in blueprint.parts:
        sources[part.name] = build_layers(part.anatomy, part.donor.layer_indices, model.config)
    layers = [
        sources[stage.slot.source][stage.slot.index if stage.donor_layer is None else stage.donor_layer]
        for stage in stages
    ]
    del stack[:]
    stack.extend(layers)


def build_layers(anatomy: Anatomy, indices: Sequence[int], config: PreTrainedConfig) -> list[nn.Module]:
    """Build a donor's layers as in its source model, on the current device and in the current dtype."""
    source = copy.deepcopy(anatomy.config)
    with inner_models(source):
        built = anatomy.model_class(source)
    layers = [decoder_stack(built, anatomy.stack_path)[index] for index in indices]
    own, new = text_config(built.config), text_config(config)
    for layer in layers:
        for module in layer.modules():
            if getattr(module, "config", None) is own:
                vars(module)["config"] = new
    return layers


def renumber(layers: Iterable[nn.Module], origins: Sequence[LayerOrigin]) -> None:
    """Give inserted layers the numbers at which they run; these index the cache."""
    for number, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
        for module in layer.modules():
            for name, value in list(vars(module).items()):
                if is_layer_number(name, value, origin.index):
                    setattr(module, name, number)


def use_config(model: PreTrainedModel, recipient: Anatomy, spliced: SplicedConfig) -> None:
    """Make a model that was built from the recipient's configuration run with another."""
    mine, new = text_config(model.config), text_config(spliced.config)
    mine.__class__ = new.__class__
    mine.__dict__.update({k: copy.deepcopy(v) for k, v in new.__dict__.items() if k not in RUNTIME})
    try:
        candidate = build_on_meta(recipient.model_class, spliced.config)
    except BUILD_ERRORS:
        return
    before, after = outer_modules(recipient.model, recipient.stack_path), outer_modules(candidate, recipient.stack_path)
    own = outer_modules(model, recipient.stack_path)
    for path in before.keys() & after.keys() & own.keys():
        set_differing(own[path], structural_attributes(before[path]), structural_attributes(after[path]))


def set_differing(module: nn.Module, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Set the attributes of a module that differ between two structures."""
    for name, value in new.items():
        if name in old and plain(old[name]) != plain(value):
            setattr(module, name, copy.deepcopy(value))


def outer_modules(model: nn.Module, stack_path: str) -> dict[str, nn.Module]:
    """Return the modules outside the decoder layers, by path."""
    return {path: module for path, module in model.named_modules() if not path.startswith(f"{stack_path}.")}
