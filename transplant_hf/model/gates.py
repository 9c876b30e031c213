"""A donor's strength as a parameter of the model, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..donor.extract import GATE
from ..errors import ConfigurationError
from .active_donors import TransplantState, state_of


def attach_gate(model: Any, name: str) -> nn.Parameter:
    """Make a donor's strength a parameter, which `named_parameters()` lists with the donor's first layer.

    A model that is saved meanwhile has the value as the donor's strength.
    """
    state = state_of(model)
    state.blueprint.check_name(name)
    state.hooks.refuse_gates([name])
    spec = state.blueprint.part(name).spec
    if spec.mode == "replace":
        raise ConfigurationError(
            f"donor {name!r} replaces recipient layers, so that its strength is 1 and cannot be trained. Insert it."
        )
    if isinstance(spec.position, tuple):
        raise ConfigurationError(
            f"donor {name!r} is spread over positions {list(spec.position)}, and its strength cannot be trained. "
            "Set it with set_strength; evaluate --strengths measures several."
        )
    first = state.hooks.layers_of(name)[0]
    device = next(first.parameters()).device
    if device.type == "meta":
        raise ConfigurationError(
            f"the layers of donor {name!r} are offloaded; load the model without offload to train its strength."
        )
    gate = nn.Parameter(torch.full((1,), spec.strength, dtype=torch.float32, device=device))
    first.register_parameter(GATE, gate)
    state.update()
    return gate


def detach_gate(model: Any, name: str) -> float:
    """Remove a donor's gate, set the donor's strength to its value, and return it."""
    state = state_of(model)
    state.blueprint.check_name(name)
    gate = state.hooks.gates().get(name)
    if gate is None:
        raise ConfigurationError(f"donor {name!r} has no gate; attach_gate(model, {name!r}) adds one.")
    value = float(gate.detach())
    if not math.isfinite(value):
        raise ConfigurationError(f"the gate of donor {name!r} is {value}; a strength must be finite. Set it first.")
    delattr(state.hooks.layers_of(name)[0], GATE)
    state.set_strengths({name: value})
    return value


@contextmanager
def gates_aside(state: TransplantState, saved: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Make every gate a plain strength inside a `with` block, to save the model."""
    gates = state.hooks.gates()
    if not gates:
        yield
        return
    before = state.blueprint
    path, layer_map = before.recipient.stack_path, before.layer_map()
    values = {
        name: (saved or {}).pop(f"{path}.{layer_map.layers_of(name)[0]}.{GATE}", gate) for name, gate in gates.items()
    }
    state.blueprint = before.with_strengths({name: float(value.detach()) for name, value in values.items()})
    for name in gates:
        delattr(state.hooks.layers_of(name)[0], GATE)
    try:
        yield
    finally:
        for name, gate in gates.items():
            state.hooks.layers_of(name)[0].register_parameter(GATE, gate)
        state.blueprint = before
