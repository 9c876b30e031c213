"""How many tokens a model reads at once, and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import ConfigurationError
from .stack import text_config

_DEFAULT_BLOCK_LENGTH = 1024


def max_context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can read at once, or `None` where its configuration sets no limit."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # -1 also stands for no limit


def choose_block_length(config: PreTrainedConfig, block_length: int | None = None) -> int:
    """Return how many tokens of a text a model is given at once."""
    limit = max_context_length(config)
    if block_length is None:
        return min(limit or _DEFAULT_BLOCK_LENGTH, _DEFAULT_BLOCK_LENGTH)
    if limit is not None and block_length > limit:
        raise ConfigurationError(
            f"block_length is {block_length}, but the model reads at most {limit} tokens (max_position_embeddings). "
            "Choose shorter blocks (--block-length)."
        )
    return block_length


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradients inside a `with` block, and restore the mode of each module after it."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True
