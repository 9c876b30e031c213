"""Change the donors of a loaded model where it stands: only a new donor's bytes are read, nothing else is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import DonorSpec
from ..donor import Donor
from ..donor.place import spec_of
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, Slot, Stage
from ..numeric import whole_number
from ..splice import Blueprint, DonorPart
from .fresh import FreshLayers, load_layers
from .gates import refuse_gate
from .state import TransplantState, state_of
from .strength import Dials
from .switch import Switch, structure_of

__all__ = ["add_donor", "move_donor", "open_donor", "remove_donor", "swap_donor"]


def add_donor(
    model: Any, donor: Donor | str, position: int | None, mode: str | None, name: str | None, strength: float | None
) -> None:
    """Do the work of `model.add_donor`."""
    with _changing(model, "add_donor()") as state:
        spec, opened = open_donor(donor, position=position, mode=mode, name=name, strength=strength)
        _change(model, state, [*state.blueprint.parts, (spec, opened)], "add_donor()")


def remove_donor(model: Any, name: str) -> None:
    """Do the work of `model.remove_donor`."""
    with _changing(model, "remove_donor()") as state:
        state.check_name(name)
        refuse_gate(state, name)
        _change(model, state, [part for part in state.blueprint.parts if part.name != name], "remove_donor()")


def move_donor(model: Any, name: str, position: int) -> None:
    """Do the work of `model.move_donor`."""
    with _changing(model, "move_donor()") as state:
        state.check_name(name)
        place = whole_number(position, f"position of donor {name!r}")
        moved = [
            dataclasses.replace(part, spec=dataclasses.replace(part.spec, position=place))
            if part.name == name
            else part
            for part in state.blueprint.parts
        ]
        _change(model, state, moved, "move_donor()")


def swap_donor(
    model: Any, name: str, donor: Donor | str, position: int | None, new_name: str | None, strength: float | None
) -> None:
    """Do the work of `model.swap_donor`."""
    with _changing(model, "swap_donor()") as state:
        state.check_name(name)
        refuse_gate(state, name)
        old = state.blueprint.part(name).spec
        spec, opened = open_donor(
            donor,
            position=old.position if position is None else position,
            mode=old.mode,
            name=new_name or name,
            strength=old.strength if strength is None else strength,
        )
        swapped = [(spec, opened) if part.name == name else part for part in state.blueprint.parts]
        _change(model, state, swapped, "swap_donor()")


def open_donor(
    donor: Donor | str, *, position: int | None, mode: str | None, name: str | None, strength: float | None
) -> tuple[DonorSpec, Donor]:
    """Open a donor that goes into a model in memory, and say where; what is not given is what it recommends.

    Raises:
        ConfigurationError: No position given and none recommended.
    """
    opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor)
    return spec_of(opened, position, mode=mode, name=name, strength=strength), opened


@contextmanager
def _changing(model: Any, what: str) -> Iterator[TransplantState]:
    """Let no other thread change a model's donors meanwhile."""
    state = state_of(model)
    with state.switch.calls.turn(what):
        _refuse_unchangeable(model, state)
        yield state


def _refuse_unchangeable(model: Any, state: TransplantState) -> None:
    reason = None
    if state.switch.disabled:
        reason = "some are switched off just now; leave disable_transplants() first"
    elif state.dials.requests.now() is not None:
        reason = "this code is inside using(...); leave it first"
    elif any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        reason = "its weights are spread over several processes; load it anew with the donors that you want"
    if reason is not None:
        raise ConfigurationError(f"the donors of this model cannot be changed: {reason}.")
    state.switch.check_stack()


def _change(
    model: Any, state: TransplantState, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]], what: str
) -> None:
    """Let a model hold these donors; whatever can be refused is refused before it is touched."""
    stays = {one.name for one in donors if isinstance(one, DonorPart)}
    blueprint = state.blueprint.redrawn(donors, _keeps_replaced(state.blueprint, donors))
    held = {stage.slot: layer for stage, layer in state.layers.items() if stage.slot.source in {RECIPIENT, *stays}}
    _refuse_missing(blueprint, held)
    fresh = [load_layers(model, blueprint, part) for part in blueprint.parts if part.name not in stays]
    before, after = state.switch.structure(), structure_of(blueprint)
    with state.switch.calls.alone(what):
        _install(model, state, blueprint, {**held, **_layers_of(fresh)})
        state.switch.take_over(before, after, {stage: worn for one in fresh for stage, worn in one.worn.items()})


def _install(model: Any, state: TransplantState, blueprint: Blueprint, layers: Mapping[Slot, nn.Module]) -> None:
    by_stage = {stage: layers[stage.slot] for stage in blueprint.built}
    state.dials.close()
    dials = Dials(blueprint, by_stage, state.dials)
    switch = Switch(model, blueprint, by_stage, dials, after=state.switch)
    state.blueprint, state.layers, state.dials, state.switch = blueprint, by_stage, dials, switch


def _layers_of(fresh: Sequence[FreshLayers]) -> dict[Slot, nn.Module]:
    return {slot: layer for one in fresh for slot, layer in one.layers.items()}


def _keeps_replaced(blueprint: Blueprint, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]]) -> bool:
    specs = [one.spec if isinstance(one, DonorPart) else one[0] for one in donors]
    replacing = [spec for spec in specs if spec.mode == "replace"]
    replaced_before = [part.spec for part in blueprint.parts if part.spec.mode == "replace"]
    if replaced_before and not blueprint.keep_replaced:
        if replacing != replaced_before:
            _refuse_lost([str(spec.name) for spec in replaced_before])
        return False
    return bool(replacing)


def _refuse_missing(blueprint: Blueprint, held: Mapping[Slot, nn.Module]) -> None:
    missing: list[Stage] = [s for s in blueprint.built if s.slot.source == RECIPIENT and s.slot not in held]
    if missing:
        _refuse_lost([f"layer {stage.slot.index}" for stage in missing])


def _refuse_lost(what: Sequence[str]) -> None:
    raise ConfigurationError(
        f"recipient layers were replaced and not kept ({', '.join(what)}), so that this change is not possible. Load "
        "the model with keep_replaced=True."
    )
