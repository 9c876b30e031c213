"""How far a model moved from the untouched recipient."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["divergence"]


def divergence(reference: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean KL(reference || model) of a batch's tokens, in nats.

    Args:
        reference: Logits of the untouched recipient, `[batch, tokens, vocabulary]`.
        logits: The model's, of the same shape.
        rows: `[batch]`, true for rows that count; all of them where none is true.

    Example:
        >>> logits = torch.tensor([[[1.0, 2.0]]])
        >>> divergence(logits, logits).item()
        0.0
    """
    if rows is not None and bool(rows.any()):
        reference, logits = reference[rows], logits[rows]
    told = F.log_softmax(logits.flatten(0, 1).float(), -1)
    wanted = F.log_softmax(reference.flatten(0, 1).float(), -1)
    return F.kl_div(told, wanted, reduction="batchmean", log_target=True)
