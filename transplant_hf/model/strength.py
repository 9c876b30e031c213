"""What donors add to the hidden state: how much of it is kept, and on top of what.

A donor d of strength s turns h into h + s (d(h) - h); donors side by side at one position all get the same h, and what
each adds is summed. Two hooks do it, on a donor's first and last layer. They are there from the start, and pass on what
a donor that stands alone at strength 1 makes: torch.compile notices attributes that change, but not hooks that come
or go.

What a thread asks for with `model.using(...)` comes before what is set; it acts through the same hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ..donor.extract import GATE
from ..errors import ConfigurationError
from ..layer_map import Stage
from ..splice import Blueprint
from .requests import Requests

__all__ = ["HOOKS_RUN_AGAIN", "Dials", "is_entrance"]

# Settings lie on the layers themselves: torch.compile watches the attributes of modules, but not those of their hooks.
_ACTIVE, _STRENGTH = "_transplant_active", "_transplant_strength"
_LEADS, _CLOSES, _INSIDE = "_transplant_leads", "_transplant_closes", "_transplant_inside"
# Before 5.23, Transformers checkpoints a layer's hooks along with it: they run once more in the backward pass, and find
# what the latest forward pass left behind, not their own.
HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)


def is_entrance(layer: nn.Module) -> bool:
    """Whether a layer needs nothing but the hidden state before it.

    What a scaled donor adds is told from what entered its first layer, and donors side by side all need the state that
    entered the first of them.
    """
    return not getattr(layer, _INSIDE, False)


class _Passing:
    """Hidden states on their way from one hook to another; each thread has its own."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __reduce__(self) -> Any:
        return _Passing, ()


class _Dial:
    """The two hooks of one donor.

    Args:
        name: The donor's name.
        layers: Its layers in order.
        requests: What the calls of each thread want.
    """

    def __init__(self, name: str, layers: Sequence[nn.Module], requests: Requests) -> None:
        self.name = name
        # Where donors that run side by side at its position find the state that they all get.
        self.meeting: _Passing | None = None
        self.requests = requests
        self._passing = _Passing()
        # The last of the former and the first of the latter: other hooks see what enters, and what goes on.
        self._hooks: list[RemovableHandle] = [
            layers[0].register_forward_pre_hook(self.before, with_kwargs=True),
            layers[-1].register_forward_hook(self.after, prepend=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Keep no hidden state of calls before."""
        self._passing = _Passing()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the hidden state that arrives, and let the donor have the one that all donors here get."""
        if not getattr(module, _ACTIVE):
            return None
        arrived = args[0] if args else kwargs["hidden_states"]
        local = self._passing.local
        local.arrived, local.gate = arrived, module._parameters.get(GATE)
        wanted = self.requests.known()
        if wanted is not None and module.training and getattr(module, "gradient_checkpointing", False):
            raise ConfigurationError(
                "using(...) lasts for a call, but gradient checkpointing runs layers again later, after it. Set the "
                "strength for every call with set_strength(name, value), or train without gradient checkpointing."
            )
        local.wanted = None if wanted is None else wanted.strengths.get(self.name, 0.0)
        local.entered = None  # the same
        if self.meeting is None:
            return None
        if getattr(module, _LEADS):
            self.meeting.local.entered = arrived
            return None
        entered = self.meeting.local.entered.to(arrived.device)
        local.entered = entered
        return ((entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered})

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put what the donor added, scaled, on top of what arrived."""
        if not getattr(module, _ACTIVE):
            return None
        several = isinstance(output, tuple | list)
        left = output[0] if several else output
        local = self._passing.local
        if getattr(local, "arrived", None) is None:
            if self.requests.known() is None and self.meeting is None and getattr(module, _STRENGTH) == 1:
                return None  # these hooks are active for calls that ask for donors; this one does not
            raise ConfigurationError(
                "the last layer of a donor whose strength is not 1, or which runs side by side with others, ran "
                "without its first layer. Run the model as a whole, outside using(...), or call set_strength(name, 1) "
                "first."
            )
        strength = getattr(module, _STRENGTH) if local.gate is None else local.gate
        strength = strength if local.wanted is None else local.wanted
        recomputed = module.training and getattr(module, "gradient_checkpointing", False)
        if recomputed and HOOKS_RUN_AGAIN and (self.meeting is not None or local.gate is not None or strength != 1):
            raise ConfigurationError(
                f"gradient checkpointing of Transformers {transformers.__version__} would compute wrong gradients for "
                f"donor {self.name!r}, whose strength is not 1 or which runs side by side with others. Use "
                "Transformers 5.23 or later, or train without gradient checkpointing."
            )
        going_on = _on_top(local.arrived, local.entered, left, strength)
        if not recomputed:
            # Kept only where a layer may run once more in the backward pass.
            local.arrived = local.entered = local.gate = local.wanted = None
            if self.meeting is not None and getattr(module, _CLOSES):
                self.meeting.local.entered = None
        return type(output)([going_on, *output[1:]]) if several else going_on


def _on_top(arrived: torch.Tensor, entered: torch.Tensor | None, left: torch.Tensor, strength: Any) -> torch.Tensor:
    """Return arrived + strength (left - entered); `entered` is `None` where it is what arrived."""
    arrived = arrived.to(left.device)
    started = arrived if entered is None else entered.to(left.device)
    if isinstance(strength, torch.Tensor) and not isinstance(strength, nn.Parameter):
        return _row_by_row(arrived, started, left, strength, entered is None)
    if isinstance(strength, torch.Tensor):
        # A number to the arithmetic, so that its own precision is kept and the hidden state's does not change.
        return arrived + strength.to(left.device).reshape(()) * (left - started)
    if strength == 0:
        return arrived  # no product with zero: the donor's values must not matter at all, overflow included
    if strength == 1:
        return left if entered is None else arrived + (left - started)
    return arrived + strength * (left - started)


def _row_by_row(
    arrived: torch.Tensor, started: torch.Tensor, left: torch.Tensor, strengths: torch.Tensor, alone: bool
) -> torch.Tensor:
    """Do the same with a strength for each row; rows of strength 0 or 1 get exactly what whole batches of them get."""
    rows, batch = strengths.shape[0], left.shape[0]
    if left.dim() < 3 or batch % rows:
        raise ConfigurationError(
            f"using(...) has strengths for {rows} rows, but a donor's hidden state has shape {list(left.shape)}, "
            "not [batch, seq, ...] with that batch. Name as many rows as the batch has."
        )
    # generate() puts the beams of a row, and sequences returned for it, behind each other.
    each = strengths.to(left).repeat_interleave(batch // rows).reshape(batch, *[1] * (left.dim() - 1))
    going_on = arrived + each * (left - started)
    if alone:
        going_on = torch.where(each == 1, left, going_on)
    return torch.where(each == 0, arrived, going_on)


class Dials:
    """The dials of one model's donors.

    Args:
        blueprint: What runs, and at what strength.
        layers: Every layer the model holds.
        before: The dials of the model as it was, where donors of a live model change; calls that are under way go on
            with what they want.
    """

    def __init__(self, blueprint: Blueprint, layers: Mapping[Stage, nn.Module], before: Dials | None = None) -> None:
        self.requests: Requests = before.requests if before else Requests()
        # Whether calls may ask for donors: the hooks of every donor that can be left out are then active, for good.
        self.open: bool = before.open if before else False
        self._layers = {
            part.name: [layer for stage, layer in layers.items() if stage.slot.source == part.name]
            for part in blueprint.parts
        }
        self._dials = {name: _Dial(name, donor, self.requests) for name, donor in self._layers.items()}
        self._meetings: dict[tuple[str, ...], _Passing] = {}
        self._off: frozenset[str] = frozenset()
        self._blueprint = blueprint
        self._place()

    def layers_of(self, name: str) -> list[nn.Module]:
        """A donor's layers in order."""
        return self._layers[name]

    def use(self, blueprint: Blueprint) -> None:
        """Take strengths and composition from another blueprint of the same layers."""
        self._blueprint = blueprint
        self._place()

    @property
    def settings(self) -> tuple[Any, ...]:
        """What is set for every call: donors, their places, strengths and composition."""
        parts = self._blueprint.parts
        return (self._blueprint.config.composition, *((part.name, part.spec.strength) for part in parts))

    def open_up(self) -> None:
        """Let calls ask for donors from now on."""
        self.open = True
        self.use(self._blueprint)

    def close(self) -> None:
        """Take every hook off: the layers go to other dials, or to nobody."""
        for name in list(self._dials):
            self._dials.pop(name).remove()

    def without(self, disabled: frozenset[str]) -> None:
        """Let the other donors go together while some are switched off."""
        self._off = disabled
        self._place()

    def _place(self) -> None:
        """Tell every dial its donor's strength, and which donors come first and last among those side by side."""
        crowds = {name: names for names in self._blueprint.crowds for name in names}
        follow: set[str] = set()
        close: set[str] = set()
        for names in self._blueprint.crowds:
            running = [name for name in names if name not in self._off]
            follow.update(running[1:])
            close.update(running[-1:])
        for name, layers in self._layers.items():
            spec, dial = self._blueprint.part(name).spec, self._dials[name]
            dial.meeting = self._meetings.setdefault(crowds[name], _Passing()) if name in crowds else None
            changes = name in crowds or self._is_scaled(name)
            active = changes or (self.open and spec.mode == "insert")
            if not active:
                dial.forget()
            setattr(layers[0], _ACTIVE, active)
            setattr(layers[-1], _ACTIVE, active)
            setattr(layers[-1], _STRENGTH, spec.strength)
            setattr(layers[0], _LEADS, name not in follow)
            setattr(layers[-1], _CLOSES, name in close)
            for number, layer in enumerate(layers):
                setattr(layer, _INSIDE, (number > 0 and changes) or name in follow)

    def _is_scaled(self, name: str) -> bool:
        return self._blueprint.part(name).spec.strength != 1.0 or GATE in self._layers[name][0]._parameters
