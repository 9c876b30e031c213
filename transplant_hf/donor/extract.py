"""Take layers out of a loaded model, named as its checkpoint would name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..architecture import LayerNames, config_of_weights, decoder_stack, find_stack, projections_of_layers, unwrapped
from ..config import DonorSpec
from ..errors import CheckpointError, ConfigurationError
from ..layouts.names import is_adapted
from ..numeric import consecutive_layers
from .record import DonorRecord
from .tensors import MemoryTensors

__all__ = ["GATE", "checkpoint_tensors", "layers_of_model"]

# A strength that is being trained lies on the donor's first layer under this name, and is no weight of the layer.
GATE = "transplant_gate"


def layers_of_model(
    model: PreTrainedModel,
    layers: Iterable[int],
    name: str | None,
    init: str = "copy",
    revision: str | None = None,
) -> tuple[DonorRecord, MemoryTensors, DonorSpec | None]:
    """Return a donor's record, its tensors and, for a transplanted donor, the place it has."""
    if init not in ("copy", "identity"):
        raise ConfigurationError(f'init must be "copy" or "identity", got {init!r}.')
    model = unwrapped(model)
    path = find_stack(model)
    count = len(decoder_stack(model, path))
    numbers = consecutive_layers(layers, "layers")
    if numbers[0] < 0 or numbers[-1] >= count:
        raise ConfigurationError(f"layers {numbers} are outside 0..{count - 1}: the model runs {count} layers.")
    # A transplant knows better than its spliced configuration what its layers were built from.
    of_transplant = getattr(model, "_record_of_layers", None)
    known = of_transplant(numbers, name) if of_transplant is not None else None
    record, place = known or (_record(model, numbers, name, revision), None)
    zeroed: Mapping[int, Collection[str]] = {}
    if init == "identity":
        zeroed = projections_of_layers(model, path, numbers)
        # What was recorded of trained layers, such as their perplexity, is not true of these.
        record = dataclasses.replace(record, metadata={"init": init})
        place = dataclasses.replace(place, mode="insert", strength=1.0) if place is not None else None
    return record, MemoryTensors(checkpoint_tensors(model, path, numbers, zeroed)), place


def _record(model: PreTrainedModel, numbers: list[int], name: str | None, revision: str | None) -> DonorRecord:
    config = config_of_weights(model).to_dict()
    config.pop("_name_or_path", None)
    return DonorRecord(
        model_type=model.config.model_type,
        source_config=config,
        layer_indices=tuple(numbers),
        source_id=model.config.name_or_path or None,
        source_revision=revision,
        name=name,
    )


def checkpoint_tensors(
    model: PreTrainedModel,
    path: str,
    numbers: Sequence[int],
    zeroed: Mapping[int, Collection[str]] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of some layers under a donor's names.

    Args:
        model: The model.
        path: Path of its list of layers.
        numbers: Running numbers; the first becomes layer 0.
        zeroed: For each running number, parameters that are zero in the donor.
        state_dict: The whole model's weights by their names in it, if others are meant than it holds.

    Returns:
        `{"layers.{i}.{name inside the layer}": tensor}`, sharing the model's memory where no fused tensor is split;
        tensors that are zero in the donor are new ones.

    Raises:
        CheckpointError: Weights that are not in memory, quantised or computed from others, or an adapter that was not
            merged.
    """
    stack = decoder_stack(model, path)
    state: dict[str, Any] = {}
    for number in numbers:
        for place, how in _reparametrized(stack[number]):
            raise CheckpointError(
                f"{path}.{number}.{place} is not a weight of its own but computed from others ({how}), which no "
                "checkpoint of this architecture has. Make it one first: torch.nn.utils.parametrize."
                "remove_parametrizations(module, name), or remove_weight_norm, remove_spectral_norm, prune.remove."
            )
        for key, held in stack[number].state_dict().items():
            if key == GATE:
                continue
            tensor = held if state_dict is None else state_dict[f"{path}.{number}.{key}"]
            if is_adapted(key):
                raise CheckpointError(
                    f"{path}.{number} holds an adapter ({key}), which is no part of a donor. Merge it into the layers "
                    "(merge_and_unload) or take it off (unload) first."
                )
            if tensor.is_meta:
                raise CheckpointError(f"{path}.{number}.{key} is offloaded; load the model without offload first.")
            if not tensor.is_floating_point() and key.endswith("weight"):
                raise CheckpointError(
                    f"{path}.{number}.{key} is quantised ({tensor.dtype}); a donor needs full precision."
                )
            zero = key in (zeroed or {}).get(number, ())
            state[f"{path}.{number}.{key}"] = torch.zeros_like(tensor) if zero else tensor.detach()
    names = LayerNames(model, path)
    tensors = {}
    for raw, tensor in revert_weight_conversion(model, state).items():
        parts = names.split(raw)
        if parts is None:
            raise CheckpointError(f"the checkpoint name {raw!r} of a layer's tensor could not be traced back.")
        tensors[f"layers.{parts.number - numbers[0]}.{parts.rest}"] = tensor
    return tensors


def _reparametrized(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Find weights that are computed from other parameters, by `parametrizations` or by older hooks."""
    for path, module in layer.named_modules():
        dot = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for name, how in module.parametrizations.items():
                yield f"{dot}{name}", ", ".join(type(one).__name__ for one in how)
        # weight_norm, spectral_norm and pruning keep the computed tensor as a plain attribute.
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            stored = [key for key in module._parameters if key.startswith(f"{name}_")]
            if stored:
                yield f"{dot}{name}", ", ".join(stored)
