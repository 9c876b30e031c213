"""The class an Auto class builds for a configuration."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from ..errors import CompatibilityError
from ..heads import auto_classes_for, model_mapping

__all__ = ["native_class"]


class _NextHeadError(CompatibilityError, ValueError):
    """The pipeline "decision" tries `AutoModelForImageTextToText` first, and another class after a `ValueError`."""


def native_class(auto_class: Any, config: PreTrainedConfig, name: str) -> tuple[Any, PreTrainedConfig]:
    """Return the class that an Auto class would use, and the configuration it would pass to it."""
    mapping = model_mapping(auto_class)
    if type(config) not in mapping:
        what = "is not a decoder-only model" if auto_class is AutoModelForCausalLM else "has no such head"
        others = ", ".join(auto_classes_for(config))
        raise (_NextHeadError if auto_class is AutoModelForImageTextToText else CompatibilityError)(
            f"recipient {name} ({config.model_type}) {what}: {auto_class.__name__} has no class for "
            f"{type(config).__name__}. {f'These have one: {others}.' if others else ''}".rstrip()
        )
    found = mapping[type(config)]
    if isinstance(found, list | tuple):
        by_name = {option.__name__: option for option in found}
        found = next((by_name[a] for a in config.architectures or () if a in by_name), found[0])
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) == text:
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    if config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        config.is_encoder_decoder, config.is_decoder = False, True
    return found, config
