"""Models from GGUF files: Transformers calls them quantized even if it unpacked every weight."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ConfigurationError

_MARK = "transplant_was_gguf"


def check_gguf_reader(gguf_file: str | None) -> None:
    """Refuse a GGUF file if the package that reads it is missing."""
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigurationError(f"reading {gguf_file} needs the package gguf: pip install gguf")


def is_quantized(model: Any) -> bool:
    """Whether a model stores weights in fewer bits than it computes with."""
    return getattr(model, "hf_quantizer", None) is not None and not _is_unpacked(model)


def was_gguf(model: Any) -> bool:
    """Whether a model's weights were read from a GGUF file."""
    return getattr(model, _MARK, False) or quantization_method(model) == "gguf"


def config_of_weights(model: Any) -> PreTrainedConfig:
    """Return a model's configuration, without the quantization of a GGUF file if its weights are unpacked."""
    config: PreTrainedConfig = model.config
    if _is_unpacked(model):
        config = copy.deepcopy(config)
        del config.quantization_config
    return config


def forget_gguf(model: Any) -> None:
    """Make a model whose weights were unpacked a model in full precision, which can be saved."""
    if was_gguf(model):
        setattr(model, _MARK, True)
    if _is_unpacked(model):
        model.hf_quantizer.remove_quantization_config(model)


def _is_unpacked(model: Any) -> bool:
    # A quantizer that leaves weights packed lists the modules that hold them.
    return quantization_method(model) == "gguf" and not getattr(model.hf_quantizer, "packed_modules", None)


def quantization_method(model: Any) -> str | None:
    """Return the name of a model's quantization, such as "bitsandbytes"."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method)
