"""Load a donor's layers alone, to put them into a model that is already there.

The donor goes through the same loader as always, into a model whose other weights are stand-ins without memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedConfig

from ..architecture import Anatomy, decoder_stack, text_config
from ..donor import Donor
from ..donor.tensors import MemoryTensors
from ..layer_map import RECIPIENT, Slot, Stage
from ..splice import Blueprint, DonorPart
from .loading import FileChecks, Loading, loading
from .switch import Attributes

__all__ = ["FreshLayers", "load_layers", "own_tensors"]


@dataclasses.dataclass(frozen=True)
class FreshLayers:
    """A donor's layers with their weights, not yet in a model.

    Args:
        layers: By their slot.
        worn: What is set on them, by the stage where they are going to run.
    """

    layers: Mapping[Slot, nn.Module]
    worn: Mapping[Stage, Attributes]


def load_layers(model: Any, blueprint: Blueprint, part: DonorPart) -> FreshLayers:
    """Load the layers of one donor for a model, in its dtype and on the device where they are going to run.

    Args:
        model: The model; it is only looked at.
        blueprint: What is going to run in it.
        part: The donor.

    Returns:
        The layers.

    Raises:
        CheckpointError: Tensors that are missing, unexpected, mis-shaped or not finite.
        IntegrityError: Files that were changed.
    """
    shell = _shell(model, blueprint, part)
    stages = {stage.slot: stage for stage in blueprint.built}
    state = shell._transplant
    layers = {s.slot: layer for s, layer in state.layers.items() if s.slot.source == part.name}
    worn = {stages[s.slot]: state.switch.worn(s) for s in state.layers if s.slot.source == part.name}
    state.dials.close()
    neighbour = _neighbour(model, blueprint, part)
    for layer in layers.values():
        _read_configuration_of(layer, shell, model)
        _run_like(layer, neighbour)
    return FreshLayers(layers, worn)


def _shell(model: Any, blueprint: Blueprint, part: DonorPart) -> Any:
    spec = dataclasses.replace(part.spec, strength=1.0, layers=None)
    lonely = dataclasses.replace(part, spec=spec, donor=own_tensors(part.donor))
    alone = blueprint.redrawn([lonely], spec.mode == "replace")
    recipient, spliced = alone.recipient, alone.built_config
    config = copy.deepcopy(spliced.config if spliced.native else recipient.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # donors stay in full precision
    with FileChecks([part.donor]) as checks, loading(Loading(alone, checks, shared=True)):
        return type(model).from_pretrained(
            None, config=config, state_dict=_stand_ins(recipient, model.dtype), dtype=model.dtype
        )


def own_tensors(donor: Donor) -> Donor:
    """Return a donor whose tensors no other model has: itself if it is in files, else a copy.

    Else training the donor would train the layers it was taken from, and every other model it is in.
    """
    if donor.source is not None:
        return donor
    copies = MemoryTensors({name: tensor.clone() for name, tensor in donor.tensors().items()})
    return donor.replaced(store=copies)


def _stand_ins(recipient: Anatomy, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the recipient's shapes that all lie in the memory of one number."""
    return {
        name: torch.zeros((), dtype=dtype if tensor.is_floating_point() else tensor.dtype).expand(tensor.shape)
        for name, tensor in recipient.model.state_dict().items()
    }


def _neighbour(model: Any, blueprint: Blueprint, part: DonorPart) -> nn.Module:
    """The recipient's layer before the donor, whose output it gets; at position 0 the one behind it."""
    running = [stage.slot for stage in model._transplant.blueprint.running(())]
    number = running.index(_nearest(running, max(part.spec.position - 1, 0)))
    return decoder_stack(model, blueprint.recipient.stack_path)[number]


def _nearest(running: list[Slot], index: int) -> Slot:
    own = [slot for slot in running if slot.source == RECIPIENT] or running
    return min(own, key=lambda slot: abs(slot.index - index))


def _read_configuration_of(layer: nn.Module, shell: Any, model: Any) -> None:
    """Let a layer read the live model's configuration instead of the one it was built with."""
    pairs: list[tuple[PreTrainedConfig, PreTrainedConfig]] = [
        (shell.config, model.config),
        (text_config(shell.config).config, text_config(model.config).config),
    ]
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            for own, live in pairs:
                if value is own:
                    vars(module)[name] = live


def _run_like(layer: nn.Module, neighbour: nn.Module) -> None:
    """Put a layer on its neighbour's device, and let it take its inputs and be checkpointed as its neighbour does."""
    hook = getattr(neighbour, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((parameter.device for parameter in neighbour.parameters() if not parameter.is_meta), "cpu")
    layer.to(device)
    if hook is not None:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device))
    if getattr(neighbour, "gradient_checkpointing", False):
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = neighbour._gradient_checkpointing_func
