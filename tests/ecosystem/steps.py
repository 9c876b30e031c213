"""What the rows of training share: steps taken by hand, and models whose last bits can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tests.ecosystem.cases import Case
from tests.helpers import layers_of

__all__ = ["aligned", "donor_parameters", "only_donor", "steps"]


def aligned(model: Any) -> Any:
    """Move weights out of the mapped files, those that are quantized apart.

    Where a tensor begins in its file differs between a donor's file and a whole checkpoint, and some kernels give
    other last bits for it.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    return model


def donor_parameters(case: Case, model: Any) -> list[nn.Parameter]:
    """The parameters of the donor's layers, in a transplant and in the reference alike."""
    return [
        parameter
        for number in range(case.position, case.position + 2)
        for parameter in layers_of(model)[number].parameters()
    ]


def only_donor(case: Case, model: Any) -> Any:
    """Freeze everything but the donor's layers."""
    model.requires_grad_(False)
    for parameter in donor_parameters(case, model):
        parameter.requires_grad_(True)
    return model


def steps(model: Any, batches: Iterable[torch.Tensor], learning_rate: float = 1e-2) -> list[float]:
    """Take a step of Adam on each batch with what may be trained; return the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses
