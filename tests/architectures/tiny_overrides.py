"""Sizes by field name, and the fields of single model types that the rules of `tiny_models` cannot guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

VOCAB = 112
HIDDEN = 32
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
EXPERTS = 4

NOT_DECODER_ONLY: dict[str, str] = {
    "gemma4_assistant": "draft model: its layers read keys and values of another model, no input_ids",
    "gemma4_unified_assistant": "draft model: its layers read keys and values of another model, no input_ids",
}
CANNOT_BUILD: dict[str, str] = {
    "gemma3n": "its vision tower needs timm and pillow; gemma3n_text is the same decoder without it",
}
# Types whose generation with the cache fails, or differs from the one without, in transformers itself.
CACHE_DIFFERS: dict[str, str] = {
    "blt": "its cache asks for a field that the configuration class lacks, and the patch model has no cache",
    "cpmant": "all tokens see each other, and cached ones do not see later ones",
    "musicgen": "the first step with a cache keeps only the last token of the prompt",
    "prophetnet": "the relative positions of the predicting streams depend on the length of the input",
    "rwkv": "generation passes all tokens again together with the state that has seen them",
}
# Types whose output at a position depends on later positions, as they are configured here.
NOT_CAUSAL: dict[str, str] = {
    "cpmant": "all tokens are context, which is seen in both directions",
    "prophetnet": "the relative positions of the predicting streams depend on the length of the input",
    "xlnet": "published models are bidirectional; generation hides later tokens with a permutation mask",
}


def _at_most(limit: int) -> Callable[[Any, Mapping[str, Any], int], Any]:
    """Make a rule that keeps small numbers and cuts large ones.

    Args:
        limit: Largest value to keep.

    Returns:
        The rule; it leaves anything that is not a number as it is.
    """
    return lambda default, defaults, depth: min(default, limit) if isinstance(default, int) else default


def _depth(default: Any, defaults: Mapping[str, Any], depth: int) -> int:
    """Give the wanted depth, also where the class has no default.

    Args:
        default: Default of the field.
        defaults: Defaults of the class.
        depth: Wanted depth.

    Returns:
        The wanted depth.
    """
    return depth


def _kv_heads(default: int | None, defaults: Mapping[str, Any], depth: int) -> int:
    """Choose the number of key-value heads: grouped where the class can group them.

    Args:
        default: Default of the field.
        defaults: Defaults of the class.
        depth: Wanted depth.

    Returns:
        Number of key-value heads.
    """
    if "kv_lora_rank" in defaults:
        return HEADS
    return 1 if default == 1 else HEADS // 2


# Names of fields, and the value of each: a number for fields that have a default, or a rule
# (default, all defaults of the class, depth) -> value.
_SIZES: tuple[tuple[str, Any], ...] = (
    ("vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size", VOCAB),
    ("pronunciation_vocab_size shape_vocab_size", VOCAB),
    # widths
    (
        "hidden_size d_model n_embd emb_dim embedding_dim input_size embedding_size input_embedding_size",
        HIDDEN,
    ),
    (
        "word_embed_proj_dim lru_width attention_hidden_size cross_attention_hidden_size hidden_size_global",
        HIDDEN,
    ),
    ("backbone_hidden_size router_hidden_size pronunciation_embed_dim shape_embed_dim", HIDDEN),
    ("out_hidden_size output_proj_dims mm_embed_dim vision_output_dim projector_input_dim", HIDDEN),
    ("projector_output_dim adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size", HIDDEN),
    ("output_embedding_size", 40),
    ("hidden_size_per_layer_input", 8),
    (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner ffn_hidden_size n_inner dff",
        64,
    ),
    ("dim_ff feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size", 64),
    ("prefix_dense_intermediate_size", 64),
    ("moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size", 24),
    ("moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size", 24),
    ("logit_scale", 1.0),
    # depth
    ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", _depth),
    ("num_encoder_layers num_decoder_layers depth", _depth),
    ("num_nextn_predict_layers num_mtp_layers", _at_most(0)),
    # attention
    ("num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads", HEADS),
    ("encoder_attention_heads decoder_attention_heads", HEADS),
    ("num_encoder_attention_heads num_decoder_attention_heads", HEADS),
    ("num_key_value_heads", _kv_heads),
    ("swa_num_key_value_heads", 2),
    ("head_dim swa_head_dim dim_head d_kv kv_channels v_head_dim attention_head_size", HEAD_DIM),
    ("qk_rope_head_dim qk_nope_head_dim query_pre_attn_scalar", HEAD_DIM),
    ("q_lora_rank kv_lora_rank index_head_dim rel_extent", 16),
    # Few index heads give many scores of exactly zero, and then the choice among equals depends on rounding.
    ("o_lora_rank index_n_heads local_attention", 8),
    ("rotary_dim index_topk attention_chunk_size d_rel", 4),
    ("sliding_window sliding_window_size attention_window_size window_size", 4),
    ("o_groups", 2),
    ("max_position_embeddings original_max_position_embeddings max_target_positions", 128),
    ("n_positions n_ctx max_seq_len context_length", 128),
    ("max_source_positions", 32),
    # Encoder classes run as decoders.
    ("is_decoder", lambda default, defaults, depth: True),
    # mixture of experts
    ("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS),
    ("num_experts_per_tok moe_topk moe_k top_k_experts n_group", _at_most(2)),
    ("n_shared_experts num_shared_experts moe_num_shared_experts topk_group", _at_most(1)),
    ("zero_expert_num", 2),
    ("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    # state space, linear attention and convolution
    ("mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_state state_size ssm_state_size", 8),
    ("mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    ("mamba_d_ssm", 64),
    ("linear_num_value_heads linear_num_heads", 4),
    ("n_mamba_heads n_groups linear_num_key_heads", 2),
    # vision and audio
    ("image_size codebook_size", 16),
    ("patch_size num_mel_bins codebook_dim", 8),
    ("num_filters", 4),
)
SIZES: dict[str, Any] = {name: value for names, value in _SIZES for name in names.split()}

# Special tokens that a class sets get these ids; all others count down from the end of the vocabulary.
SPECIAL_TOKENS: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": 2,
}

# Of these, the ones that are set even where the class has no default: some classes fill in large ids later.
ALWAYS_SET_TOKENS: tuple[str, ...] = ("pad_token_id", "bos_token_id", "eos_token_id")

# Parameters whose values have a range of their own: decays, time steps, learned thresholds.
KEEP_AS_INITIALIZED: tuple[str, ...] = (
    "A_log",
    "dt_bias",
    "dt_proj.bias",
    "time_decay",
    "time_mix",
    "time_first",
)
# Saved state that is no parameter, and that differs between the layers of a trained model.
NOISY_BUFFERS: tuple[str, ...] = ("e_score_correction_bias", "expert_bias", "layer_scalar")


def _cycle(*kinds: Any) -> Callable[[int], list[Any]]:
    """Make a per-layer list in which the kinds take turns.

    Args:
        kinds: Values of the first layers.

    Returns:
        Function from the depth to the list.
    """
    return lambda depth: [kinds[layer % len(kinds)] for layer in range(depth)]


def _prefix(first: Any, rest: Any) -> Callable[[int], list[Any]]:
    """Make a per-layer list whose first layer differs from all others.

    Args:
        first: Value of the first layer.
        rest: Value of every other layer.

    Returns:
        Function from the depth to the list.
    """
    return lambda depth: [first if layer == 0 else rest for layer in range(depth)]


def _all_but_two(depth: int) -> int:
    """Count the layers behind the first two, which are the first of each of two kinds.

    Args:
        depth: Wanted depth.

    Returns:
        Number of layers that share keys and values.
    """
    return max(depth - 2, 0)


_SLIDING_FULL = _cycle("sliding_attention", "full_attention")
_LINEAR_FULL = _cycle("linear_attention", "full_attention")
_DENSE_SPARSE = _prefix("dense", "sparse")

# Fields by model type, also of sub-configurations; a function of the depth where the value depends on it.
OVERRIDES: dict[str, dict[str, Any]] = {
    # The default has no attention layer, without which the cache has no length.
    "bamba": {"attn_layer_indices": lambda depth: list(range(1, depth, 2))},
    "granitemoehybrid": {"layer_types": _LINEAR_FULL},
    # Attention at 1, 4, ..., experts at 1, 3, ...: three kinds of layers in four.
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    # By default some kinds first appear in a layer that a shallow model does not reach.
    "nemotron_h": {"layers_block_type": _cycle("linear_attention", "full_attention", "moe", "mlp")},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    # Its shared block is tied between layers, so it needs two of them.
    "zamba": {
        "layers_block_type": lambda depth: (
            _cycle("linear_attention", "hybrid")(depth)
            if depth > 3
            else ["linear_attention", "hybrid", "hybrid"][3 - depth :]
        )
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "granite_swa": {"layer_rope_theta": _cycle(10000.0, 50000.0)},
    "granitemoe_swa": {"layer_rope_theta": _cycle(10000.0, 50000.0)},
    # One kind of layer by default, though the architecture has two.
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"mlp_only_layers": [1]},
    "flint": {"mlp_only_layers": [0]},
    "lfm2": {"layer_types": _cycle("conv", "full_attention")},
    "ministral": {"layer_types": _SLIDING_FULL, "head_dim": HEAD_DIM},
    "mellum": {"layer_types": _SLIDING_FULL, "mlp_layer_types": _DENSE_SPARSE},
    "zaya": {"layer_types": _cycle("hybrid", "hybrid_sliding"), "sliding_window": 4},
    "inkling_text": {"mlp_layer_types": _DENSE_SPARSE, "logits_mup_width_multiplier": 1.0},
    "minimax_m3_vl_text": {
        "layer_types": _prefix("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _DENSE_SPARSE,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "laguna": {"layer_types": _SLIDING_FULL, "num_attention_heads_per_layer": _cycle(4, 8)},
    "glm_moe_dsa": {"indexer_types": _cycle("full", "shared")},
    "cohere2_moe": {"first_k_dense_replace": 1},
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "layer_types": None},
    "smollm3": {"no_rope_layer_interval": 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    # Required fields that have no default.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_window_layers": 2},
    "lfm2_moe": {"layer_types": _cycle("conv", "full_attention")},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "moe_topk": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2, "ffn_hidden_size": 64},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "hc_lowrank": 8,
    },
    # Sizes that follow from others or that have names of their own.
    "mamba2": {"num_heads": 8},
    # Head sizes are rounded up to multiples of 64 in one place only, so both dimensions must be multiples.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "gpt_neo": {"attention_types": lambda depth: [[["global", "local"], depth // 2], [["global"], depth % 2]]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": _cycle("local", "lsh"),
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (8, 24),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "minimax": {"block_size": 4},
    # Its masks ignore the window that its cache keeps, so a short window would cut the cache only.
    "moshi": {"sliding_window": 128},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "local_attention_window_len": 4,
    },
    "deepseek_v4": {
        "layer_types": _cycle("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "hc_mult": 2,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    # The last layers share the keys and values of the last earlier layer of their kind.
    "gemma3n_text": {
        "num_kv_shared_layers": _all_but_two,
        "laurel_rank": 8,
        "activation_sparsity_pattern": _prefix(0.5, 0.0),
    },
    # Two families of one type: experts in every layer, or (in `gemma4`) shared keys and values.
    "gemma4_text": {
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4": {
        "text_config": {
            "num_kv_shared_layers": _all_but_two,
            "use_double_wide_mlp": True,
            "enable_moe_block": False,
        }
    },
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
        }
    },
    # Types that look in both directions unless told otherwise.
    "xlm": {"causal": True},
    "t5": {"is_decoder": False},
    # Sparse attention falls back to full attention on short inputs, with a warning.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    # Two rows of input ids are one sample with two code books.
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    # Its loading code sets the row of the padding token to zero, so that a reloaded model would differ.
    "youtu": {"pad_token_id": None},
    "minicpm3": {"dim_model_base": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "whisper": {"begin_suppress_tokens": None},
    # Large tables of the vision and audio parts.
    "got_ocr2_vision": {"output_channels": 8, "global_attn_indexes": [1], "window_size": 2},
    "gemma4_vision": {"position_embedding_size": 16, "pooling_kernel_size": 1},
    "gemma4_audio": {"subsampling_conv_channels": [8, 4]},
    "gemma4_unified_vision": {"mm_posemb_size": 16},
    "gemma4_unified_audio": {"audio_embed_dim": 16},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
        "nemo_conv_channels": HIDDEN,
        "bias_max_distance": 16,
    },
}
