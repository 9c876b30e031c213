"""Find the decoder layers of a model by introspection, without a table of architectures; how much text it reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel

from ..errors import BUILD_ERRORS, CompatibilityError, ConfigurationError

_DEFAULT_BLOCK_LENGTH = 1024


def text_key(config: PreTrainedConfig) -> str | None:
    """Return the field that holds the decoder's part of a configuration; `None` if the whole describes the decoder."""
    text = config.get_text_config(decoder=True)
    # Flat encoder-decoder configurations hand out an edited copy; the model reads the original.
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the decoder's part of a configuration, as the object that the model will read."""
    key = text_key(config)
    return config if key is None else getattr(config, key)


def stated_layers(fields: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers that a `config.json` states; `None` if Transformers cannot read it."""
    if fields.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(dict(fields)))
    except BUILD_ERRORS:
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


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
        else:
            named = isinstance(found, str | os.PathLike)
            what = f"the name {os.fspath(found)!r}" if named else f"a {type(found).__name__}"
            raise ConfigurationError(
                f"a loaded model is needed here, got {what}: load it first, for instance with "
                "AutoModelForCausalLM.from_pretrained."
            )
    return found


def find_stack(model: PreTrainedModel, what: str = "") -> str:
    """Return the path of the `nn.ModuleList` that holds the decoder layers."""
    found = [path for path, layers in _outer_lists(model) if len(layers) and all(map(_is_layer, layers))]
    text = text_config(model.config)
    of_decoder = [path for path in found if _owner_reads(model, path, text)] or found
    name = f"{what}: {type(model).__name__} ({model.config.model_type})".removeprefix(": ")
    if len(of_decoder) == 1:
        if any(vars(part).get("is_decoder") is False for part in model.get_submodule(of_decoder[0]).modules()):
            raise CompatibilityError(
                f"{name} is not a decoder-only model: its layers are set up as an encoder's (is_decoder=False), so "
                "that each token sees later ones."
            )
        return of_decoder[0]
    which = f"it has several, {', '.join(of_decoder)}" if of_decoder else "no list of layers found"
    raise CompatibilityError(f"{name} is not a decoder-only model with one stack of layers: {which}.")


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


def _is_layer(module: nn.Module) -> bool:
    # Every decoder layer in Transformers can be checkpointed; projections and norms cannot.
    if isinstance(module, GradientCheckpointingLayer):
        return True
    # Older classes are called a layer or block, with attention in it.
    parts = [type(part).__name__.lower() for part in module.modules() if part is not module]
    return type(module).__name__.endswith(("Layer", "Block")) and any("attention" in part for part in parts)


def _owner_reads(model: PreTrainedModel, path: str, text: Any) -> bool:
    """Whether the innermost sub-model around `path` is configured by the decoder's configuration."""
    owner: PreTrainedModel = model
    module: nn.Module = model
    for part in path.split("."):
        if isinstance(module, PreTrainedModel):
            owner = module
        module = getattr(module, part)
    return owner.config is text or type(owner.config) is type(text)


def max_context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can read at once, or `None` where its configuration sets no limit."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # -1 also stands for no limit


def choose_block_length(config: PreTrainedConfig, block_length: int | None = None) -> int:
    """Return how many tokens of a text a model is given at once."""
    limit = max_context_length(config)
    if block_length is None:
        return min(limit or _DEFAULT_BLOCK_LENGTH, _DEFAULT_BLOCK_LENGTH)
    if limit is not None and block_length > limit:
        raise ConfigurationError(
            f"block_length is {block_length}, but the model reads at most {limit} tokens (max_position_embeddings). "
            "Choose shorter blocks (--block-length)."
        )
    return block_length


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradients inside a `with` block, and restore the mode of each module after it."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True
