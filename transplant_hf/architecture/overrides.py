"""Set fields of a recipient's configuration, as `recipient_overrides` of a transplant's configuration asks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import BUILD_ERRORS, ConfigurationError
from ..recipient_fields import is_settable

# How a configuration is read, and where the model is from: not part of what a model computes.
NOT_SETTABLE = re.compile(r"_.*|auto_map|model_type|quantization_config|transformers_weights|name_or_path|\w*_file")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# Keyword arguments of Transformers that set fields of other names.
_SETS = {"num_labels": ("id2label", "label2id"), "torch_dtype": ("dtype",), "rope_scaling": ("rope_parameters",)}


def apply_overrides(
    config: PreTrainedConfig, overrides: Mapping[str, Any], explicit: Mapping[str, Any] | None = None
) -> None:
    """Set fields of a recipient's configuration."""
    if not overrides:
        return
    try:
        _apply(config, overrides, explicit or {})
        copy.deepcopy(config).to_dict()
        _ = config.num_labels  # computed from other fields
    except BUILD_ERRORS as error:
        raise ConfigurationError(
            f"recipient_overrides ({', '.join(map(str, overrides))}) do not fit the recipient's configuration, of type "
            f"{config.model_type!r}: {error}. Correct them in config.json."
        ) from error


def _apply(config: PreTrainedConfig, overrides: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    known = {config.attribute_map.get(name, name) for name in explicit}
    known |= {field for name in explicit for field in _SETS.get(name, ())}
    for written, value in overrides.items():
        name = config.attribute_map.get(written, written)
        if name in known or known & set(_SETS.get(name, ())):
            continue
        if name in _names_of_layer_count(config):
            raise ConfigurationError(
                f"{written}={value!r} cannot be set by a transplant's configuration (recipient_overrides): the number "
                "of layers is that of the pinned recipient. Remove it; donors add and replace layers."
            )
        if NOT_SETTABLE.fullmatch(name) or not is_settable(type(config), name):
            raise ConfigurationError(
                f"{written} of the recipient's configuration cannot be set by a transplant's (recipient_overrides). "
                "If from_pretrained accepts it, pass it there."
            )
        current = getattr(config, name, None)
        if isinstance(current, PreTrainedConfig) and isinstance(value, Mapping):
            inner = explicit.get(name)
            _apply(current, value, inner if isinstance(inner, Mapping) else {})
        elif name in _IMPLEMENTATIONS:
            setattr(config, f"_{name}", value)
        elif name in ("dtype", "torch_dtype"):
            config.dtype = _dtype(value)
        else:
            setattr(config, name, copy.deepcopy(value))


def _names_of_layer_count(config: PreTrainedConfig) -> set[str]:
    return {name for word in _LAYER_COUNTS for name in (word, config.attribute_map.get(word, word))}


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value not in (None, "auto") and not isinstance(found, torch.dtype):
        raise TypeError(f"dtype={value!r} is not a dtype of torch, such as 'float32'")
    return found
