"""Optimizer and learning-rate schedule of the demo: Muon for the matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Quintic Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon/): drives singular values
# to about 1. torch.optim.Muon does so one matrix at a time and in bfloat16, which many CPUs emulate slowly.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Most rows of the embedding have a gradient in few steps only.
_FASTER = 3.0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices; needs about half of AdamW's steps here.

    Args:
        params: Parameters of two dimensions.
        lr: Learning rate on AdamW's scale: each update has a root mean square of about 0.2 times this.
        momentum: Decay of the running gradient.
        weight_decay: Decoupled weight decay.
        iterations: Newton-Schulz iterations; more than 3 cost time and did not lower the loss here.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 3,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Not used; every optimizer takes one.
        """
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(sorted(parameter.shape))].append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters whose shapes agree up to transposition, in one batch."""
        updates = []
        for parameter in parameters:
            gradient: Any = parameter.grad
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(state["momentum"], group["momentum"])
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
        orthogonal = orthogonalise(torch.stack(updates), group["iterations"])
        for parameter, update in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = update if update.shape == parameter.shape else update.T
            parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalise(matrices: torch.Tensor, iterations: int) -> torch.Tensor:
    """Replace the singular values of matrices by about 1.

    Args:
        matrices: Shape (batch, rows, columns) with rows <= columns.
        iterations: Newton-Schulz iterations.

    Returns:
        Tensor of the same shape.
    """
    first, third, fifth = _COEFFICIENTS
    result = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        result = torch.baddbmm(result, polynomial, result, beta=first)
    return result


def make_optimizers(named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float) -> list[torch.optim.Optimizer]:
    """Optimizers for all parameters that require gradients.

    Args:
        named_parameters: Names and parameters.
        lr: Peak learning rate of the matrices; embeddings and norms learn three times as fast.

    Returns:
        Optimizers that step together.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=lr))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=_FASTER * lr, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a half cosine to zero.

    Args:
        step: Step number from 0.
        steps: Number of steps.

    Returns:
        Factor of the peak learning rate, above 0 and at most 1.
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
