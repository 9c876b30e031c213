"""The loss of what a model predicted, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import CheckpointError, DataError
from .windows import IGNORED, Batch, Windows

__all__ = ["batch_loss", "check_vocabulary", "device_of", "rows_at_once", "summed_loss"]

# How many logits are turned to float32 at once.
_CHUNK = 1 << 22
# How many logits a forward pass may give: one gibibyte in float32.
_MOST_LOGITS = 1 << 28


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the negative log-likelihood of all targets that count, in nats.

    Args:
        logits: `[batch, tokens, vocabulary]`.
        targets: `[batch, tokens]`; `IGNORED` where they do not count.
    """
    flat = logits.flatten(0, 1)
    wanted = targets.flatten()
    counted = (wanted != IGNORED).nonzero().squeeze(1)
    whole = len(counted) == len(wanted)
    total = 0.0
    for numbers in counted.split(max(1, _CHUNK // flat.shape[1])):
        begin, end = int(numbers[0]), int(numbers[-1]) + 1
        # Where nothing is left out between them, a view instead of a copy.
        chosen = flat[begin:end] if whole or end - begin == len(numbers) else flat[numbers.to(flat.device)]
        loss = F.cross_entropy(chosen.float(), wanted[numbers].to(flat.device), reduction="sum")
        total += loss.item()
    return total


def batch_loss(logits: torch.Tensor, batch: Batch, number: int, name: str) -> float:
    """Return the summed loss of a batch.

    Args:
        logits: `[batch, tokens, vocabulary]`.
        batch: What was read.
        number: Its number, for the message.
        name: The text's name, for the message.

    Raises:
        CheckpointError: It is not finite.
    """
    loss = summed_loss(logits, batch.targets)
    if not math.isfinite(loss):
        raise CheckpointError(
            f"the loss on batch {number} of {name} ({len(batch.input_ids)} x {batch.input_ids.shape[1]} tokens) is "
            f"{loss}: the model's weights hold NaN or infinity, or its dtype is too small. Try dtype=float32."
        )
    return loss


def rows_at_once(model: Any, windows: Windows, batch_size: int) -> int:
    """Return how many rows a batch may have, so that its logits fit into memory.

    Args:
        model: The model.
        windows: What it reads.
        batch_size: What was asked for; at least one row is read.
    """
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or 1
    return max(1, min(batch_size, _MOST_LOGITS // (windows.block_length * vocabulary)))


def check_vocabulary(model: Any, windows: Windows, name: str) -> None:
    """Refuse a text of another model's tokens.

    Raises:
        DataError: A token number that the model does not know.
    """
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if vocabulary is not None and windows.highest >= vocabulary:
        raise DataError(
            f"{name} holds the token number {windows.highest}, the model knows {vocabulary} tokens, "
            f"0..{vocabulary - 1}. Encode the text with the model's own tokenizer."
        )


def device_of(model: Any) -> torch.device:
    """Return where a model takes its input; offloaded ones take it on the CPU."""
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
