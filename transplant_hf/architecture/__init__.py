"""Find, describe and compare decoder layers, and the configuration that builds them: by looking."""

from .anatomy import Anatomy, LayerOrigin
from .context import choose_block_length, eval_mode, max_context_length
from .gguf import check_gguf_reader, config_of_weights, forget_gguf, is_quantized, quantization_method, was_gguf
from .identity import output_weights
from .names import LayerNames, LayerTensorName
from .native import SplicedConfig, build_failure, first_candidate, layer_differences, splice_config
from .overrides import apply_overrides
from .quantized import dequantized_layer, differentiable, is_packed, quantization_fields
from .recipient import Recipient, native_class, open_recipient
from .stack import decoder_stack, find_stack, stated_layers, text_config, unwrapped

__all__ = [
    "Anatomy",
    "LayerNames",
    "LayerOrigin",
    "LayerTensorName",
    "Recipient",
    "SplicedConfig",
    "apply_overrides",
    "build_failure",
    "check_gguf_reader",
    "choose_block_length",
    "config_of_weights",
    "decoder_stack",
    "dequantized_layer",
    "differentiable",
    "eval_mode",
    "find_stack",
    "first_candidate",
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
