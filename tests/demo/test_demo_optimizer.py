"""The demo's optimizer and schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transplant_hf.demo.optimizer import Muon, learning_rate_factor, make_optimizers, orthogonalise


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, 5))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_treats_transposed_matrices_alike() -> None:
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    wide, tall = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6, 4))
    wide.grad, tall.grad = gradient.clone(), gradient.T.clone()
    Muon([wide, tall], lr=0.1).step()
    torch.testing.assert_close(wide.detach(), tall.detach().T)
    assert (wide * gradient).sum() < 0


def test_each_trained_parameter_has_one_optimizer() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "proj": nn.Linear(4, 4), "frozen": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    optimizers = make_optimizers(model.named_parameters(), lr=0.1)
    kinds = {type(o).__name__: [tuple(p.shape) for g in o.param_groups for p in g["params"]] for o in optimizers}
    assert kinds == {"Muon": [(4, 4)], "AdamW": [(4, 4), (4,)]}


def test_schedule_rises_then_falls() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert max(factors) == pytest.approx(1.0)
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert min(factors) > 0
    assert 0 < learning_rate_factor(0, 1) <= 1
