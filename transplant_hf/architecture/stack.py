"""Find the decoder layers of a model by introspection, without a table of architectures."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import CompatibilityError, ConfigurationError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The part of a configuration that describes the decoder."""

    config: PreTrainedConfig
    key: str | None  # its field in the full configuration; `None` if it is the full one


def text_config(config: PreTrainedConfig) -> TextConfig:
    """Return the decoder's part of a configuration, as the object that the model will read."""
    text = config.get_text_config(decoder=True)
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            return TextConfig(text, key)
    # Flat encoder-decoder configurations hand out an edited copy; the model reads the original.
    return TextConfig(config, None)


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the model inside the wrappers of torch.compile, data parallelism and PEFT."""
    found = model
    while not isinstance(found, PreTrainedModel):
        if isinstance(found, nn.DataParallel | nn.parallel.DistributedDataParallel):
            found = found.module
        elif isinstance(found, nn.Module) and hasattr(found, "_orig_mod"):
            found = found._orig_mod
        elif isinstance(found, nn.Module) and hasattr(found, "get_base_model"):
            found = found.get_base_model()  # type: ignore[operator]
        elif isinstance(found, str | os.PathLike):
            raise ConfigurationError(
                f"a loaded model is needed here, got the name {os.fspath(found)!r}: load it first, for instance with "
                "AutoModelForCausalLM.from_pretrained."
            )
        else:
            raise ConfigurationError(f"a loaded model of Transformers is needed here, got a {type(found).__name__}.")
    return found


def find_stack(model: PreTrainedModel, what: str = "") -> str:
    """Return the path of the `nn.ModuleList` that holds the decoder layers."""
    found = [path for path, module in _outer_lists(model) if _holds_layers(module)]
    text = text_config(model.config).config
    of_decoder = [path for path in found if _owner_reads(model, path, text)] or found
    name = f"{what}: {type(model).__name__} ({model.config.model_type})".removeprefix(": ")
    if len(of_decoder) == 1:
        if any(vars(part).get("is_decoder") is False for part in model.get_submodule(of_decoder[0]).modules()):
            raise CompatibilityError(
                f"{name} is not a decoder-only model: its layers are set up as an encoder's (is_decoder=False), each "
                "token sees the later ones."
            )
        return of_decoder[0]
    if not of_decoder:
        raise CompatibilityError(
            f"{name} is not a decoder-only model with one stack of layers: no list of layers found."
        )
    raise CompatibilityError(
        f"{name} is not a decoder-only model with one stack of layers: it has several, {', '.join(of_decoder)}."
    )


def decoder_stack(model: nn.Module, path: str) -> nn.ModuleList:
    """Return the list of decoder layers at `path`."""
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    return stack


def _outer_lists(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.ModuleList]]:
    lists = []
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            lists.append((path, child))
        else:
            lists += _outer_lists(child, f"{path}.")
    return lists


def _holds_layers(module: nn.ModuleList) -> bool:
    # Every decoder layer in Transformers can be checkpointed; lists of projections or norms cannot.
    return len(module) > 0 and all(
        isinstance(layer, GradientCheckpointingLayer) or _old_block(layer) for layer in module
    )


def _old_block(layer: nn.Module) -> bool:
    """A layer class that predates `GradientCheckpointingLayer`: called a layer or block, with attention in it."""
    named_so = type(layer).__name__.endswith(("Layer", "Block"))
    return named_so and any("attention" in type(part).__name__.lower() for part in layer.modules() if part is not layer)


def _owner_reads(model: PreTrainedModel, path: str, text: Any) -> bool:
    """Whether the innermost sub-model around `path` is configured by the decoder's configuration."""
    owner: PreTrainedModel = model
    module: nn.Module = model
    for part in path.split("."):
        if isinstance(module, PreTrainedModel):
            owner = module
        module = getattr(module, part)
    return owner.config is text or type(owner.config) is type(text)
