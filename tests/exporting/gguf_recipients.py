"""Tiny models as GGUF files, laid out as llama.cpp's converter does, matrices in eight bits unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers import randomised

NAME = "recipient.gguf"
VOCABULARY = 264
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Transformers does not read the size of a head from files of Qwen 3, and the scale of attention from those of Gemma.
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
_GEMMA: dict[str, Any] = {**_HEADS, "head_dim": 256, "sliding_window": 4}


def tiny_model(architecture: str, seed: int, **fields: Any) -> PreTrainedModel:
    """A model of six layers with random weights."""
    shape = {**_SHAPE, **fields}
    made: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{"head_dim": 8, "rms_norm_eps": 1e-5, **shape})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_HEADS, "head_dim": 128, **shape, **_HEADS})),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**{**shape, **_GEMMA, **fields})),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **_GEMMA, **fields})),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
        ),
    }
    return randomised(made[architecture](), seed)


def write_model(
    model: PreTrainedModel,
    architecture: str,
    path: Path,
    stored: str = "Q8_0",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model as a GGUF file, its matrices in one type, perhaps with more metadata and tensors."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    config: Any = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(VOCABULARY)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("llama", "qwen2"):
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    else:
        writer.add_key_length(getattr(config, "head_dim", 8))
        writer.add_value_length(getattr(config, "head_dim", 8))
    if architecture.startswith("gemma") and config.sliding_window != 4096:  # what Transformers has without the key
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_array(key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(gguf, writer, architecture, name, tensor, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    """Add a tokenizer that splits text into bytes."""
    tokens = [b"<pad>", b"<s>", b"</s>", b"<unk>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    tokens += [f"<unused{number}>".encode() for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[5] * (VOCABULARY - 260)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


def _add_tensor(gguf: Any, writer: Any, architecture: str, name: str, tensor: torch.Tensor, stored: str) -> None:
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    local = gguf.get_tensor_name_map(arch, 6).get_name(name, try_suffixes=(".weight", ".bias"))
    if architecture == "llama" and ("attn_q" in local or "attn_k" in local):
        half = tensor.shape[0] // (heads := tensor.shape[0] // 8) // 2
        rows = [head * 8 + part * half + row for head in range(heads) for row in range(half) for part in (0, 1)]
        tensor = tensor[rows]
    if architecture.startswith("gemma") and local.endswith("norm.weight"):
        tensor = tensor + 1
    if architecture == "gpt2" and any(word in local for word in ("qkv.w", "attn_output.w", "up.w", "down.w")):
        tensor = tensor.T
    kind = gguf.GGMLQuantizationType[stored if tensor.ndim == 2 and "position" not in local else "F32"]
    writer.add_tensor(local, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
