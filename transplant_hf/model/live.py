"""Add, remove, move and swap donors of a loaded model. Only the weights of a new donor are read."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedConfig

from ..architecture import decoder_stack, text_config
from ..config import DonorSpec
from ..donor import Donor
from ..donor.place import donor_and_position, spec_of
from ..donor.tensors import MemoryTensors
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, Position, Slot
from ..splice import Blueprint, DonorPart
from .active_donors import TransplantState, state_of
from .load_weights import from_pretrained
from .structure import Attributes, structure_of


def open_donor(
    donor: Donor | str, position: Position | None, mode: str | None, name: str | None, strength: float | None
) -> tuple[DonorSpec, Donor]:
    """Open a donor for a loaded model; arguments that are `None` come from its recommendation."""
    donor, position = donor_and_position(donor, position)
    opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor)
    return spec_of(opened, position, mode=mode, name=name, strength=strength), opened


@contextmanager
def changing(model: Any, what: str, name: str | None = None) -> Iterator[TransplantState]:
    """Let no other thread change a model's donors; refuse a model that cannot change, and an unknown donor."""
    state = state_of(model)
    with state.calls.turn(what):
        reason = None
        if state.disabled:
            reason = "some are switched off; leave disable_transplants() first"
        elif state.choices.current() is not None:
            reason = "this code is inside using(...); leave it first"
        elif any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            reason = "its weights are distributed over several processes; load it again with the donors that you want"
        if reason is not None:
            raise ConfigurationError(f"the donors of this model cannot be changed: {reason}.")
        state.check_stack()
        if name is not None:
            state.blueprint.check_name(name)
        yield state


def change(model: Any, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]], what: str) -> None:
    """Let a model hold these donors. Everything that can fail is done before the model is touched."""
    state = state_of(model)
    kept = {donor.name for donor in donors if isinstance(donor, DonorPart)}
    blueprint = state.blueprint.with_donors(donors, _keeps_replaced(state.blueprint, donors))
    layers = {stage.slot: layer for stage, layer in state.layers.items() if stage.slot.source in {RECIPIENT, *kept}}
    missing = [s.slot for s in blueprint.built if s.slot.source == RECIPIENT and s.slot not in layers]
    if missing:
        raise _not_kept([f"layer {slot.index}" for slot in missing])
    attributes: dict[Slot, Attributes] = {}
    for part in blueprint.parts:
        if part.name not in kept:
            new_layers, new_attributes = _load_layers(model, blueprint, part)
            layers |= new_layers
            attributes |= new_attributes
    state.structure(frozenset())  # slow the first time: calls need not wait for it
    structure = structure_of(blueprint)
    with state.calls.alone(what):
        state.replace_donors(blueprint, layers, structure, attributes)


def _keeps_replaced(blueprint: Blueprint, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]]) -> bool:
    specs = [donor.spec if isinstance(donor, DonorPart) else donor[0] for donor in donors]
    replacing = [spec for spec in specs if spec.mode == "replace"]
    before = [part.spec for part in blueprint.parts if part.spec.mode == "replace"]
    if before and not blueprint.keep_replaced:
        if replacing != before:
            raise _not_kept([str(spec.name) for spec in before])
        return False
    return bool(replacing)


def _not_kept(what: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"recipient layers were replaced and not kept ({', '.join(what)}), so that this change is not possible. Load "
        "the model with keep_replaced=True."
    )


# -- The layers of one donor -----------------------------------------------------------------------------------------


def _load_layers(
    model: Any, blueprint: Blueprint, part: DonorPart
) -> tuple[dict[Slot, nn.Module], dict[Slot, Attributes]]:
    """Load the layers of one donor, in the model's dtype and on the device where they are going to run."""
    # Loaded as always, into a recipient whose own weights are placeholders: each has the memory of one number.
    spec = dataclasses.replace(part.spec, strength=1.0, layers=None)
    alone = dataclasses.replace(part, spec=spec, donor=own_tensors(part.donor))
    plan, dtype = blueprint.with_donors([alone], spec.mode == "replace"), model.dtype
    weights = {
        name: torch.zeros((), dtype=dtype if tensor.is_floating_point() else tensor.dtype).expand(tensor.shape)
        for name, tensor in plan.recipient.model.state_dict().items()
    }
    how: dict[str, Any] = {"from_memory": True, "adapt_config": without_quantization}
    shell = from_pretrained(type(model), plan, None, state_dict=weights, dtype=dtype, **how)
    state = shell._transplant
    own = {stage: layer for stage, layer in state.layers.items() if stage.slot.source == part.name}
    attributes = {stage.slot: state.attributes_of(stage) for stage in own}
    state.hooks.remove()
    neighbor = _neighbor(model, part)
    for layer in own.values():
        _use_config_of(model, shell, layer)
        _set_up_like(neighbor, layer)
    return {stage.slot: layer for stage, layer in own.items()}, attributes


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Donors stay in full precision."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def own_tensors(donor: Donor) -> Donor:
    """Return a donor whose tensors no other model has: itself if it is in files, otherwise a copy.

    Without the copy, training the donor would train the layers that it was taken from.
    """
    if donor.source is not None:
        return donor
    copies = MemoryTensors({name: tensor.clone() for name, tensor in donor.tensors().items()})
    return donor.replaced(store=copies)


def _neighbor(model: Any, part: DonorPart) -> nn.Module:
    """The running layer of the recipient before the donor; at position 0 the one after it."""
    blueprint = model._transplant.blueprint
    running = [stage.slot for stage in blueprint.running(())]
    own = [slot for slot in running if slot.source == RECIPIENT] or running
    first = part.spec.position[0] if isinstance(part.spec.position, tuple) else part.spec.position
    nearest = min(own, key=lambda slot: abs(slot.index - max(first - 1, 0)))
    return decoder_stack(model, blueprint.recipient.stack_path)[running.index(nearest)]


def _use_config_of(model: Any, shell: Any, layer: nn.Module) -> None:
    """Let a layer read the live model's configuration instead of the one that it was built with."""
    live = {id(shell.config): model.config, id(text_config(shell.config)): text_config(model.config)}
    for module in layer.modules():
        vars(module).update({name: live[id(value)] for name, value in vars(module).items() if id(value) in live})


def _set_up_like(neighbor: nn.Module, layer: nn.Module) -> None:
    """Put a layer on its neighbor's device, with the same device hook and gradient checkpointing."""
    hook = getattr(neighbor, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((parameter.device for parameter in neighbor.parameters() if not parameter.is_meta), "cpu")
    layer.to(device)
    if hook is not None:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device))
    if getattr(neighbor, "gradient_checkpointing", False):
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        for name, value in vars(neighbor).items():  # the checkpointing function, which Transformers sets on each layer
            if isinstance(value, functools.partial):
                vars(layer).setdefault(name, value)
