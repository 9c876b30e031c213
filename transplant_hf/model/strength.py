"""The strength of a donor: how much of what it adds to the hidden state is kept.

A donor d of strength s turns h into h + s (d(h) - h). Donors that run side by side at one position all get the same h,
and what they add is summed. Two hooks do this, on the first and the last layer of each donor; of a donor that is spread
through the recipient, on those of each part. They are always there, and pass the output of a donor of strength 1
through: torch.compile notices attributes of modules that change, but not hooks that are added or removed.

A choice by call, with `model.using(...)`, goes through the same hooks and takes precedence.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GradientCheckpointingLayer

from ..donor.extract import GATE
from ..errors import ConfigurationError
from ..layer_map import Stage
from ..splice import Blueprint
from .rows import is_another_stream, run_by_row, run_on_all_rows
from .using import NOT_COMPILED, CallChoices

_ROLE = "_transplant_role"
# Before 5.23, Transformers checkpoints a layer together with its hooks: they run again in the backward pass, and find
# the hidden state of the latest forward pass instead of their own.
HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)


class _Role(NamedTuple):
    """What the hooks do, as an attribute of the layer: torch.compile checks attributes of modules, not of hooks."""

    active: bool  # whether the hooks act at all
    strength: float  # of the donor
    leads: bool  # whether the donor is the first of a group side by side, or in no group
    closes: bool  # whether it is the last of a group
    inside: bool  # whether the layer needs the state that entered an earlier layer
    routed: bool  # whether each call chooses its donors, so that there is a choice in every call


def is_entrance(layer: nn.Module) -> bool:
    """Whether a layer needs only the hidden state before it, not the one that entered an earlier layer."""
    role: _Role | None = getattr(layer, _ROLE, None)
    return role is None or not role.inside


class _PerThread:
    """Hidden states that one hook hands to another, for each thread; not copied with the model."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __reduce__(self) -> Any:
        return _PerThread, ()


class _DonorHooks:
    """The two hooks of one donor, or of a part of one."""

    def __init__(self, name: str, layers: Sequence[nn.Module], choices: CallChoices) -> None:
        # Without the layers, which hold the hooks: a model is freed when its last reference is dropped.
        self.name, self.choices = name, choices
        # The state that enters a group of donors side by side; `None` outside a group.
        self.group: _PerThread | None = None
        self.states = _PerThread()
        # The last of the pre-hooks and the first of the others: other hooks see what enters and what goes on.
        self.handles: list[RemovableHandle] = [
            layers[0].register_forward_pre_hook(self.before, with_kwargs=True),
            layers[-1].register_forward_hook(self.after, prepend=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the hidden state that arrives. In a group, pass on the state that entered the group."""
        role: _Role = getattr(module, _ROLE)
        if not role.active:
            return None
        arrived = args[0] if args else kwargs["hidden_states"]
        choice = self.choices.of_layer(arrived)
        if choice is not None and choice.router is not None:
            choice = choice.router.choose(choice, arrived, self.choices)  # runs these hooks, too
            self.choices.change_call(choice)
        local = self.states.local
        local.arrived, local.gate = arrived, module._parameters.get(GATE)
        if choice is None and role.routed:
            raise ConfigurationError(NOT_COMPILED)
        if choice is not None and module.training and getattr(module, "gradient_checkpointing", False):
            raise ConfigurationError(
                "using(...) lasts for a call, but gradient checkpointing runs layers again after it. Set the strength "
                "for all calls with set_strength(name, value), or train without gradient checkpointing."
            )
        local.chosen = None if choice is None else choice.strengths.get(self.name, 0.0)
        local.entered = None  # the same as arrived
        if self.group is None:
            return None
        if role.leads:
            self.group.local.entered = arrived
            return None
        local.entered = self.group.local.entered.to(arrived.device)
        if args:
            return (local.entered, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": local.entered}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add what the donor added, scaled, to what arrived."""
        role: _Role = getattr(module, _ROLE)
        if not role.active:
            return None
        in_tuple = isinstance(output, tuple | list)
        left = output[0] if in_tuple else output
        local = self.states.local
        if getattr(local, "arrived", None) is None:
            if self.choices.of_layer(left) is None and self.group is None and role.strength == 1:
                return None  # active only for calls that choose donors, which this one does not
            raise ConfigurationError(
                "the last layer of a donor whose strength is not 1, or which runs side by side with others, ran "
                "without its first layer. Run the whole model, outside using(...), or call set_strength(name, 1) first."
            )
        strength = role.strength if local.gate is None else local.gate
        strength = strength if local.chosen is None else local.chosen
        scaled = isinstance(strength, torch.Tensor) or strength != 1
        if scaled and in_tuple and any(is_another_stream(other, left) for other in output[1:]):
            raise ConfigurationError(
                f"donor {self.name!r} returns a second hidden state in this call, which cannot be scaled or left out. "
                "Run it at strength 1, outside using(...); disable_transplants() switches it off."
            )
        recomputed = module.training and getattr(module, "gradient_checkpointing", False)
        if recomputed and HOOKS_RUN_AGAIN and (self.group is not None or local.gate is not None or strength != 1):
            raise ConfigurationError(
                f"gradient checkpointing of Transformers {transformers.__version__} would compute wrong gradients for "
                f"donor {self.name!r}, whose strength is not 1 or which runs side by side with others. Use "
                "Transformers 5.23 or later, or train without gradient checkpointing."
            )
        goes_on = _scaled(local.arrived, local.entered, left, strength)
        if not recomputed:
            # Kept only where the layer may run again in the backward pass.
            local.arrived = local.entered = local.gate = local.chosen = None
            if self.group is not None and role.closes:
                self.group.local.entered = None
        return type(output)([goes_on, *output[1:]]) if in_tuple else goes_on


def _scaled(arrived: torch.Tensor, entered: torch.Tensor | None, left: torch.Tensor, strength: Any) -> torch.Tensor:
    """Return arrived + strength (left - entered); `entered` is `None` if it is the same as `arrived`."""
    arrived = arrived.to(left.device)
    start = arrived if entered is None else entered.to(left.device)
    if isinstance(strength, torch.Tensor) and not isinstance(strength, nn.Parameter):
        return _scaled_by_row(arrived, start, left, strength, entered is None)
    if isinstance(strength, torch.Tensor):
        # A scalar tensor keeps its own precision and does not change the dtype of the hidden state.
        return arrived + strength.to(left.device).reshape(()) * (left - start)
    if strength == 0:
        return arrived  # not a product with zero: values of the donor that overflow must not matter
    if strength == 1:
        return left if entered is None else arrived + (left - start)
    return arrived + strength * (left - start)


def _scaled_by_row(
    arrived: torch.Tensor, start: torch.Tensor, left: torch.Tensor, strengths: torch.Tensor, alone: bool
) -> torch.Tensor:
    """Scale each row by its strength; rows of strength 0 or 1 get exactly the output of a whole batch of such rows."""
    rows, batch = strengths.shape[0], left.shape[0]
    if left.dim() < 3 or batch % rows:
        raise ConfigurationError(
            f"using(...) has strengths for {rows} rows, but a donor's hidden state has shape {list(left.shape)}, "
            "not [batch, seq, ...] with that batch. Name as many rows as the batch has."
        )
    # generate() puts the beams of a row, and the sequences that it returns for a row, next to each other.
    by_row = strengths.to(left).repeat_interleave(batch // rows).reshape(batch, *[1] * (left.dim() - 1))
    goes_on = arrived + by_row * (left - start)
    if alone:
        goes_on = torch.where(by_row == 1, left, goes_on)
    return torch.where(by_row == 0, arrived, goes_on)


class StrengthHooks:
    """The hooks of a model's donors."""

    def __init__(self, blueprint: Blueprint, layers: Mapping[Stage, nn.Module], choices: CallChoices) -> None:
        # The layers of each donor, in order.
        self.layers = {
            part.name: [layer for stage, layer in layers.items() if stage.slot.source == part.name]
            for part in blueprint.parts
        }
        self._choices = choices
        # The layers of each part of a donor, and its hooks.
        self._hooks: dict[str, list[tuple[list[nn.Module], _DonorHooks]]] = {}
        for placement in blueprint.splice.placements:
            parts = [[self.layers[placement.name][number] for number in numbers] for _, numbers in placement.parts]
            self._hooks[placement.name] = [(part, _DonorHooks(placement.name, part, choices)) for part in parts]
        self._groups: dict[tuple[str, ...], _PerThread] = {}

    def set(self, blueprint: Blueprint, disabled: Collection[str], by_call: bool, routed: bool) -> None:
        """Set what the hooks do."""
        group_of = {name: group for group in blueprint.side_by_side_groups for name in group}
        gates = self.gates()
        for name, parts in self._hooks.items():
            spec, group = blueprint.part(name).spec, group_of.get(name)
            running = [other for other in group or () if other not in disabled]
            leads = name not in running[1:]
            changes = group is not None or spec.strength != 1.0 or name in gates
            active = changes or (by_call and spec.mode == "insert")
            for layers, hooks in parts:
                hooks.group = self._groups.setdefault(group, _PerThread()) if group else None
                if not active:
                    hooks.states = _PerThread()  # releases the hidden states of earlier calls
                for number, layer in enumerate(layers):
                    inside = (number > 0 and changes) or not leads
                    setattr(layer, _ROLE, _Role(active, spec.strength, leads, name in running[-1:], inside, routed))
                    if by_call and spec.mode == "insert":
                        run_by_row(layer, name, self._choices)

    def remove(self) -> None:
        """Remove all hooks."""
        while self._hooks:
            for layers, hooks in self._hooks.popitem()[1]:
                for handle in hooks.handles:
                    handle.remove()
                for layer in layers:
                    run_on_all_rows(layer)

    def gates(self) -> dict[str, nn.Parameter]:
        """The strengths that are parameters while they are trained, by donor name."""
        gates = {name: layers[0]._parameters.get(GATE) for name, layers in self.layers.items()}
        return {name: gate for name, gate in gates.items() if gate is not None}

    def refuse_gates(self, names: Collection[str] | None = None) -> None:
        """Refuse to set a strength that is being trained; of any donor by default."""
        for name in self.gates():
            if names is None or name in names:
                raise ConfigurationError(
                    f"the strength of donor {name!r} is being trained; remove its gate first: "
                    f"detach_gate(model, {name!r})."
                )


# -- Strengths that are trained ----------------------------------------------------------------------------------------


def attach_gate(model: Any, name: str) -> nn.Parameter:
    """Make a donor's strength a parameter, which `named_parameters()` lists with the donor's first layer."""
    state = model._transplant
    state.blueprint.check_name(name)
    state.hooks.refuse_gates([name])
    spec, first, reason = state.blueprint.part(name).spec, state.hooks.layers[name][0], None
    device = next(first.parameters()).device
    if spec.mode == "replace":
        reason = "it replaces recipient layers. Insert it"
    elif isinstance(spec.position, tuple):
        reason = f"it is spread over positions {list(spec.position)}. Set it with set_strength (evaluate --strengths)"
    elif device.type == "meta":
        reason = "its layers are offloaded. Load the model without offload"
    if reason is not None:
        raise ConfigurationError(f"the strength of donor {name!r} cannot be trained: {reason}.")
    gate = nn.Parameter(torch.full((1,), spec.strength, dtype=torch.float32, device=device))
    first.register_parameter(GATE, gate)
    state.update()
    return gate


def detach_gate(model: Any, name: str) -> float:
    """Remove a donor's gate, set the donor's strength to its value, and return it."""
    state = model._transplant
    value = float(state.hooks.gates()[name].detach())
    state.blueprint.with_strengths({name: value})  # refuses a number that is not finite
    delattr(state.hooks.layers[name][0], GATE)
    state.set_strengths({name: value})
    return value


@contextmanager
def gates_aside(state: Any, saved: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Make every gate a plain strength inside a `with` block, to save the model."""
    gates, before = state.hooks.gates(), state.blueprint
    path, layer_map = before.recipient.stack_path, before.layer_map()
    values = {
        name: (saved or {}).pop(f"{path}.{layer_map.layers_of(name)[0]}.{GATE}", gate) for name, gate in gates.items()
    }
    state.blueprint = before.with_strengths({name: float(value.detach()) for name, value in values.items()})
    for name in gates:
        delattr(state.hooks.layers[name][0], GATE)
    try:
        yield
    finally:
        for name, gate in gates.items():
            state.hooks.layers[name][0].register_parameter(GATE, gate)
        state.blueprint = before
