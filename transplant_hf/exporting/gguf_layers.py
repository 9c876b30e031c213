"""How llama.cpp stores the decoder layers of the architectures that donors can be added to.

Its converter changes some weights. The rules here are repeated from it: they cannot be found out from a file. An
architecture is listed once logits of a file of it were compared with Transformers' in llama.cpp
(`tests/exporting/test_llama_cpp.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

# Whether llama.cpp reads the kind of each layer from the file: sliding or full attention.
READS_KINDS = ("gemma2", "gemma3")
# The number of layers by which llama.cpp recognizes the one model that scales its attention differently.
RECOGNIZED_COUNTS = {"gemma2": 46, "gemma3": 62}
# Metadata of an architecture that is read here or by Transformers, or that does not change what a layer computes.
_ATTENTION = ("head_count", "head_count_kv", "key_length", "value_length", "sliding_window", "sliding_window_pattern")
_NORMS = ("layer_norm_epsilon", "layer_norm_rms_epsilon")
_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count")
_OTHERS = ("attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base", "vocab_size")
_EXPERTS = ("expert_count", "expert_used_count")
UNDERSTOOD = frozenset((*(f"attention.{name}" for name in _ATTENTION + _NORMS), *_SIZES, *_OTHERS, *_EXPERTS))


def _unchanged(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    return tensor


def _rows_interleaved(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Put the two rows that RoPE rotates together side by side; Transformers has them half a head apart."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.partition(".")[0])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _norms_plus_one(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Store what a norm multiplies by; Transformers stores what is added to 1."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def _transposed(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Store matrices as linear layers do; GPT-2 in Transformers has them transposed."""
    return tensor.T if tensor.ndim == 2 else tensor


# What becomes of a layer's weight in float32, by its name in the file.
ARCHITECTURES: dict[str, Callable[[str, torch.Tensor, PreTrainedConfig], torch.Tensor]] = {
    "gemma2": _norms_plus_one,
    "gemma3": _norms_plus_one,
    "gpt2": _transposed,
    "llama": _rows_interleaved,
    "qwen2": _unchanged,
    "qwen3": _unchanged,
}
