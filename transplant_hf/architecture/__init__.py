"""Find, describe and compare decoder layers, and the configuration that builds them: by looking."""

from .anatomy import Anatomy, LayerOrigin
from .identity import output_weights
from .names import LayerNames
from .quantized import (
    check_gguf_reader,
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
    text_config,
    unwrapped,
)

__all__ = [
    "Anatomy",
    "LayerNames",
    "LayerOrigin",
    "Recipient",
    "apply_overrides",
    "check_gguf_reader",
    "choose_block_length",
    "decoder_stack",
    "eval_mode",
    "find_stack",
    "forget_gguf",
    "is_packed",
    "is_quantized",
    "max_context_length",
    "native_class",
    "open_recipient",
    "output_weights",
    "quantization_fields",
    "quantization_method",
    "text_config",
    "unwrapped",
    "was_gguf",
]
