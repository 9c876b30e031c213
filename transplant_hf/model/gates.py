"""A donor's strength as a parameter, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..donor.extract import GATE
from ..errors import ConfigurationError
from .state import TransplantState, state_of

__all__ = ["attach_gate", "detach_gate", "gates_aside", "gates_of", "refuse_gate"]


def attach_gate(model: Any, name: str) -> nn.Parameter:
    """Make a donor's strength a parameter of the model, so that it can be trained.

    It lies on the donor's first layer, where `named_parameters()` and what wraps a model find it. What is saved
    meanwhile has its value as the donor's strength.

    Args:
        model: A transplanted model.
        name: The donor's name.

    Returns:
        The parameter, `[1]` in float32; it starts at the donor's strength.

    Raises:
        ConfigurationError: No such donor, one that replaces layers or is offloaded, or a gate that is there already.
    """
    state = state_of(model)
    state.check_name(name)
    refuse_gate(state, name)
    spec = state.blueprint.part(name).spec
    if spec.mode == "replace":
        raise ConfigurationError(
            f"donor {name!r} replaces recipient layers, so that its strength is 1 and cannot be trained. Insert it."
        )
    first = state.dials.layers_of(name)[0]
    device = next(first.parameters()).device
    if device.type == "meta":
        raise ConfigurationError(
            f"the layers of donor {name!r} are offloaded; load the model without offload to train its strength."
        )
    gate = nn.Parameter(torch.full((1,), spec.strength, dtype=torch.float32, device=device))
    first.register_parameter(GATE, gate)
    state.dials.use(state.blueprint)
    return gate


def detach_gate(model: Any, name: str) -> float:
    """Take a donor's gate off and set the donor's strength to its value.

    Args:
        model: The model.
        name: The donor's name.

    Returns:
        The strength.

    Raises:
        ConfigurationError: No gate there, or one that is not finite; it stays then.
    """
    state = state_of(model)
    state.check_name(name)
    gates = gates_of(state)
    if name not in gates:
        raise ConfigurationError(f"donor {name!r} has no gate; attach_gate(model, {name!r}) gives it one.")
    value = float(gates[name].detach())
    if not math.isfinite(value):
        raise ConfigurationError(f"the gate of donor {name!r} is {value}; a strength must be finite. Set it first.")
    _take_off(state, name)
    state.turn({name: value})
    return value


def gates_of(state: TransplantState) -> dict[str, nn.Parameter]:
    """Return the gates that are attached, by their donors' names."""
    first = {part.name: state.dials.layers_of(part.name)[0] for part in state.blueprint.parts}
    found = {name: layer._parameters.get(GATE) for name, layer in first.items()}
    return {name: gate for name, gate in found.items() if isinstance(gate, nn.Parameter)}


def refuse_gate(state: TransplantState, name: str) -> None:
    """Refuse to turn by hand what is being trained.

    Raises:
        ConfigurationError: The donor has a gate.
    """
    if name in gates_of(state):
        raise ConfigurationError(
            f"the strength of donor {name!r} is being trained; take its gate off first: detach_gate(model, {name!r})."
        )


@contextmanager
def gates_aside(state: TransplantState, saved: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Let every gate be a plain strength inside a `with` block, so that it can be written down.

    Args:
        state: The model's transplant.
        saved: The weights that are going to be written, if not the model's; gates are taken out of them.
    """
    gates = gates_of(state)
    if not gates:
        yield
        return
    before = state.blueprint
    path, layer_map = before.recipient.stack_path, before.layer_map()
    values = {
        name: (saved or {}).pop(f"{path}.{layer_map.layers_of(name)[0]}.{GATE}", gate) for name, gate in gates.items()
    }
    state.blueprint = before.turned({name: float(value.detach()) for name, value in values.items()})
    for name in gates:
        _take_off(state, name)
    try:
        yield
    finally:
        for name, gate in gates.items():
            state.dials.layers_of(name)[0].register_parameter(GATE, gate)
        state.blueprint = before


def _take_off(state: TransplantState, name: str) -> None:
    del state.dials.layers_of(name)[0]._parameters[GATE]
