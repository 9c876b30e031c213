"""Perplexity on held-out text."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TransplantError

__all__ = ["perplexity"]


@torch.inference_mode()
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
    if len(stream) < 2:
        raise TransplantError("Perplexity needs at least 2 tokens.")
    inputs, targets = stream[:-1], stream[1:]
    whole = len(inputs) // context * context
    batches = list(
        zip(
            inputs[:whole].view(-1, context).split(batch_size),
            targets[:whole].view(-1, context).split(batch_size),
            strict=True,
        )
    )
    if whole < len(inputs):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    was_training = model.training
    model.eval()
    total = 0.0
    for block, target in batches:
        if block.numel() == 0:
            continue
        logits = model(input_ids=block, use_cache=False).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum").item()
    model.train(was_training)
    return math.exp(total / len(targets))
