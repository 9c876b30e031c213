"""Models read from a GGUF file: Transformers calls them quantized, also where it unpacked every weight on reading."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ConfigurationError

__all__ = ["check_gguf_reader", "config_of_weights", "forget_gguf", "is_quantized", "was_gguf"]

_MARK = "transplant_was_gguf"


def check_gguf_reader(gguf_file: str | None) -> None:
    """Refuse to read a GGUF file without the library that reads them.

    Raises:
        ConfigurationError: It is not installed.
    """
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigurationError(f"reading {gguf_file} needs the package gguf: pip install gguf")


def is_quantized(model: Any) -> bool:
    """Whether weights of a model are held in fewer bits than they compute with."""
    return getattr(model, "hf_quantizer", None) is not None and not _is_unpacked(model)


def was_gguf(model: Any) -> bool:
    """Whether a model's weights were read from a GGUF file."""
    return getattr(model, _MARK, False) or _method(model) == "gguf"


def config_of_weights(model: Any) -> PreTrainedConfig:
    """Return a model's configuration; without the quantization of a GGUF file whose weights are unpacked."""
    config: PreTrainedConfig = model.config
    if _is_unpacked(model):
        config = copy.deepcopy(config)
        del config.quantization_config
    return config


def forget_gguf(model: Any, source: Any = None) -> None:
    """Let a model whose weights were unpacked be what it is: one in full precision, which can be saved.

    Args:
        model: The model; changed in place.
        source: Whose weights it has, if not its own.
    """
    if was_gguf(model if source is None else source):
        setattr(model, _MARK, True)
    if _is_unpacked(model):
        model.hf_quantizer.remove_quantization_config(model)


def _is_unpacked(model: Any) -> bool:
    # A quantizer that leaves weights packed lists the modules that hold them.
    return _method(model) == "gguf" and not getattr(model.hf_quantizer, "packed_modules", None)


def _method(model: Any) -> str | None:
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method)
