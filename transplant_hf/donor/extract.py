"""Make a donor from layers of a loaded model, with the tensor names of the model's checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..architecture import LayerNames, decoder_stack, find_stack, is_packed, is_quantized, output_weights, unwrapped
from ..architecture.names import is_adapted, unpacked_conversions
from ..architecture.quantized import config_of_weights
from ..config import DonorSpec
from ..errors import CheckpointError, ConfigurationError
from ..numeric import ascending_layers
from .record import DonorRecord
from .tensors import MemoryTensors

# The parameter on a donor's first layer that trains its strength; it is not a weight of the layer.
GATE = "transplant_gate"


def layers_of_model(
    model: PreTrainedModel,
    layers: Iterable[int],
    name: str | None,
    init: str = "copy",
    revision: str | None = None,
) -> tuple[DonorRecord, MemoryTensors, DonorSpec | None]:
    """Return a donor's record, its tensors and, for layers of a transplanted donor, its place."""
    if init not in ("copy", "identity"):
        raise ConfigurationError(f'init must be "copy" or "identity", got {init!r}.')
    model = unwrapped(model)
    path = find_stack(model)
    count = len(decoder_stack(model, path))
    numbers = ascending_layers(layers, "layers", count=count)
    # A transplant's layers come from several models, which its configuration does not tell.
    record_in_transplant: Any = getattr(model, "_record_of_layers", lambda numbers, name: None)
    known = {"layer_indices": tuple(numbers), "source_id": model.config.name_or_path or None, "name": name}
    record, place = record_in_transplant(numbers, name) or (
        DonorRecord.of_layers(config_of_weights(model), source_revision=revision, **known),
        None,
    )
    constants: Mapping[int, Mapping[str, float]] = {}
    if init == "identity":
        constants = output_weights(model, path, numbers)
        # Metadata of the trained layers, such as their perplexity, does not hold for these.
        record = dataclasses.replace(record, metadata={"init": init})
        place = dataclasses.replace(place, mode="insert", strength=1.0) if place is not None else None
    return record, MemoryTensors(checkpoint_tensors(model, path, numbers, constants)), place


def checkpoint_tensors(
    model: PreTrainedModel,
    path: str,
    numbers: Sequence[int],
    constants: Mapping[int, Mapping[str, float]] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of some layers under a donor's names."""
    stack = decoder_stack(model, path)
    state: dict[str, Any] = {}
    for number in numbers:
        for place, how in _reparametrized(stack[number]):
            raise CheckpointError(
                f"{path}.{number}.{place} is computed from other parameters ({how}), and no checkpoint of this "
                "architecture has these. Remove the parametrization first: torch.nn.utils.parametrize."
                "remove_parametrizations(module, name), or remove_weight_norm, remove_spectral_norm, prune.remove."
            )
        for key, own in stack[number].state_dict().items():
            if key == GATE:
                continue
            tensor = own if state_dict is None else state_dict[f"{path}.{number}.{key}"]
            if is_adapted(key):
                raise CheckpointError(
                    f"{path}.{number} has an adapter ({key}), which a donor cannot hold. Merge it into the layers "
                    "(merge_and_unload) or remove it (unload) first."
                )
            name = f"{path}.{number}.{key}"
            if tensor.is_meta:
                raise CheckpointError(f"{name} is offloaded; load the model without offload first.")
            packed = is_packed(tensor) if is_quantized(model) else not tensor.is_floating_point()
            if packed and key.endswith("weight"):
                raise CheckpointError(f"{name} is quantized ({tensor.dtype}); a donor needs full precision.")
            value = (constants or {}).get(number, {}).get(key)
            state[name] = tensor.detach() if value is None else torch.full_like(tensor, value)
    names = LayerNames(model, path)
    tensors = {}
    written: Any = _WithoutPacking(model)
    for raw, tensor in revert_weight_conversion(written, state).items():
        parts = names.split(raw)
        if parts is None:
            raise CheckpointError(f"the checkpoint name {raw!r} of a layer's tensor could not be traced back.")
        tensors[f"layers.{numbers.index(parts.number)}.{parts.rest}"] = tensor
    return tensors


class _WithoutPacking:
    """A model without its rules for packed weights in checkpoints: the layers that are read have none.

    A model whose weights were dequantized while it was loaded has such rules, too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return unpacked_conversions(self._model) if name == "_weight_conversions" else getattr(self._model, name)


def _reparametrized(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield weights that are computed from other parameters, by `parametrizations` or by older hooks."""
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
