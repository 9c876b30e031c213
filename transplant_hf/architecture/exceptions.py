"""What looking cannot tell: the few true exceptions, each with its reason. Each has a test.

Everything else about an architecture is found by introspection (`stack.py`, `fingerprint.py`, `native.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["REFUSED", "REWRITES", "SURGERY_ONLY"]

Fields = dict[str, Any]

# Model types whose layers cannot be moved, and why. Refused by name, before any weight is read.
REFUSED: dict[str, str] = {}

# Model types whose layers look the same everywhere but use their number for more than the cache: the layers are
# inserted into the built model, each keeping what its number made of it.
SURGERY_ONLY: dict[str, str] = {}


def _sparse_step_as_list(fields: Fields, num_layers: int) -> Fields:
    """`decoder_sparse_step` picks every n-th layer; the same choice as step 1 and a list of dense layers."""
    step, dense = fields.get("decoder_sparse_step"), fields.get("mlp_only_layers")
    if step is None or dense is None or not fields.get("num_experts"):
        return fields
    dense = [n for n in range(num_layers) if n in dense or (n + 1) % max(step, 1) != 0]
    return {**fields, "decoder_sparse_step": 1, "mlp_only_layers": dense}


# Rules about layer numbers that a configuration can also say as a list, which then follows the layers.
REWRITES: dict[str, tuple[Callable[[Fields, int], Fields], ...]] = {
    model_type: (_sparse_step_as_list,)
    for model_type in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe_text")
}
