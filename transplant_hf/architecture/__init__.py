"""Find, describe and compare decoder layers, and the configuration that builds them: by looking."""

from .anatomy import Anatomy, LayerOrigin
from .identity import output_weights
from .names import LayerNames
from .native import SplicedConfig, build_failure, candidates, layer_differences, splice_config
from .quantized import (
    check_gguf_reader,
    config_of_weights,
    dequantized_layer,
    differentiable,
    forget_gguf,
    is_packed,
    is_quantized,
    quantization_fields,
    quantization_method,
    was_gguf,
)
from .recipient import Recipient, apply_overrides, native_class, open_recipient
from .stack import (
    choose_block_length,
    decoder_stack,
    eval_mode,
    find_stack,
    max_context_length,
    stated_layers,
    text_config,
    unwrapped,
)

__all__ = [
    "Anatomy",
    "LayerNames",
    "LayerOrigin",
    "Recipient",
    "SplicedConfig",
    "apply_overrides",
    "build_failure",
    "candidates",
    "check_gguf_reader",
    "choose_block_length",
    "config_of_weights",
    "decoder_stack",
    "dequantized_layer",
    "differentiable",
    "eval_mode",
    "find_stack",
    "forget_gguf",
    "is_packed",
    "is_quantized",
    "layer_differences",
    "max_context_length",
    "native_class",
    "open_recipient",
    "output_weights",
    "quantization_fields",
    "quantization_method",
    "splice_config",
    "stated_layers",
    "text_config",
    "unwrapped",
    "was_gguf",
]
