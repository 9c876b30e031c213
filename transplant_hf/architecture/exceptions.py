"""Facts that introspection cannot find: the few exceptions, each with its reason and a test.

Everything else about an architecture is found by introspection (`stack.py`, `anatomy.py`, `native.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]

# Layers that cannot be moved alone, recognized by a field of the configuration. They are refused before weights are
# read. (Weights tied between layers, and tables with an entry for each layer, are found by introspection.)
REFUSALS: tuple[tuple[Callable[[Fields], Any], str], ...] = (
    (
        lambda fields: fields.get("hidden_size_per_layer_input"),
        "an embedding table outside them has a part for each layer (hidden_size_per_layer_input), and a donor has none",
    ),
    (
        lambda fields: fields.get("num_kv_shared_layers"),
        "its last layers have no keys and values of their own but read those of earlier layers (num_kv_shared_layers)",
    ),
    (
        lambda fields: "shared" in (fields.get("indexer_types") or ()),
        "some layers choose tokens by the indexer of a layer before them (indexer_types has 'shared')",
    ),
    (
        lambda fields: "n_recurrent_loops" in fields,
        "a section of its layers runs several times, each time with a cache of its own (n_recurrent_loops)",
    ),
)


# Types whose first layer does something in `forward`, by its number, that no other layer can do.
FIRST_STAYS_FIRST: dict[str, str] = {
    "rwkv": "its layer 0 normalizes the embeddings, and only layer 0 can",
}


# Types whose layers return more than one hidden state, so that `h + s (donor(h) - h)` does not apply.
SEVERAL_STREAMS: dict[str, str] = {
    "reformer": "its layers return two hidden states, and each changes the other",
}

# Types whose first dimension of hidden states is not the batch.
ROWS_APART: dict[str, str] = {
    "xlnet": "its hidden states are [seq, batch, hidden]",
}


def _sparse_step_as_list(fields: Fields, num_layers: int) -> Fields:
    """`decoder_sparse_step` picks every n-th layer; the same choice as step 1 and a list of dense layers."""
    step, dense = fields.get("decoder_sparse_step"), fields.get("mlp_only_layers")
    if step is None or dense is None or not fields.get("num_experts"):
        return fields
    dense = [n for n in range(num_layers) if n in dense or (n + 1) % max(step, 1) != 0]
    return {**fields, "decoder_sparse_step": 1, "mlp_only_layers": dense}


# Rules about layer numbers that a configuration can also state as a list, which then follows the layers.
REWRITES: dict[str, tuple[Callable[[Fields, int], Fields], ...]] = {
    model_type: (_sparse_step_as_list,)
    for model_type in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe_text")
}


def _attention_types_from_layers(changed: Fields) -> Fields:
    """The class recomputes `attention_layers` from `attention_types`, a run-length form of it."""
    return {**changed, "attention_types": [[changed["attention_layers"], 1]]}


# Fields that must agree with another field that followed the layers.
COMPLETIONS: dict[str, tuple[Callable[[Fields], Fields], ...]] = {"gpt_neo": (_attention_types_from_layers,)}
