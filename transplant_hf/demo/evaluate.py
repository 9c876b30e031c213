"""Perplexity on held-out text."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .. import evaluation

__all__ = ["perplexity"]


def perplexity(model: PreTrainedModel, stream: torch.Tensor, context: int, batch_size: int = 16) -> float:
    """Token-weighted perplexity of a stream of tokens, read in blocks that do not overlap.

    Every token but the first is predicted once, from at most `context` tokens before it in its block. Nothing
    is padded: the shorter last block is read by itself.

    Args:
        model: A causal language model.
        stream: Token numbers of shape (tokens,), at least 2.
        context: Length of a block, in tokens.
        batch_size: Number of blocks to read at once.

    Returns:
        The exponential of the mean negative log-likelihood per token.

    Raises:
        TransplantError: There is no token to predict.
    """
    return evaluation.perplexity(model, stream, block_length=context, batch_size=batch_size, quiet=True).value
