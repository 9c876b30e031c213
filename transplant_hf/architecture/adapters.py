"""Names of tensors that belong to adapters, as PEFT writes them."""

from __future__ import annotations

import re

__all__ = ["is_adapted", "is_adapter"]

_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|ia3_|hada_|lokr_|oft_|boft_|vera_|adalora)")


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter that was not merged into the layers.

    Example:
        >>> is_adapter("base_model.model.h.0.attn.c_attn.lora_A.default.weight")
        True
    """
    return bool(_ADAPTER.search(name))


def is_adapted(name: str) -> bool:
    """Whether a tensor of a model in memory belongs to an adapter, or to a layer that an adapter wraps.

    Example:
        >>> is_adapted("h.0.attn.c_attn.base_layer.weight")
        True
    """
    return is_adapter(name) or "base_layer" in name.split(".")
