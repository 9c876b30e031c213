"""A model of tensors without contents: what it holds after loading, and what each tensor takes in its file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..architecture import Anatomy, LayerNames
from ..donor.dtypes import loaded_dtype
from ..donor.tensors import layer_of
from ..inspection.headers import TensorHeader
from ..layer_map import RECIPIENT, LayerMap
from ..splice import Blueprint, follow_quantization
from .numbers import BLOCKS, SCALES, keep_precision, pack_experts, quantization
from .subject import Subject

__all__ = ["Body", "Held", "bodies"]


@dataclasses.dataclass(frozen=True)
class Held:
    """A parameter or buffer.

    Args:
        name: Its name in the model.
        shape: Its dimensions.
        dtype: Its type after loading.
        layer: The number of the running layer it is in; `None` outside of them.
        source: Where it is from: "recipient" or a donor's name.
        stored: Bytes of it in files; 0 for what no file holds.
        buffer: Whether it is a buffer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None
    source: str
    stored: int
    buffer: bool = False

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.num_elements * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A model on the meta device, with its tensors as they are after loading.

    Args:
        model: The model.
        stack_path: Path of its list of decoder layers.
        layer_map: Where each running layer is from.
        held: Its tensors, tied ones once.
        parameters: How many numbers its parameters are, however they are stored.
        kept: What Transformers keeps in float32.
    """

    model: PreTrainedModel
    stack_path: str
    layer_map: LayerMap
    held: tuple[Held, ...]
    parameters: int
    kept: tuple[str, ...]

    @property
    def weights(self) -> tuple[Held, ...]:
        """Its parameters."""
        return tuple(held for held in self.held if not held.buffer)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a module or tensor is in."""
        return _layer_of(name, self.stack_path)


def bodies(subject: Subject, dequantize: bool) -> tuple[Body, Body | None]:
    """Return the untouched recipient and the transplant as they are after loading.

    Args:
        subject: What is planned.
        dequantize: Whether a quantised recipient is dequantised on loading.
    """
    recipient, blueprint = subject.recipient, subject.blueprint
    fields: Mapping[str, Any] | None = quantization(recipient.config, dequantize, recipient.what)
    stored = _stored_by_parameter(recipient, subject.headers) if subject.headers else _assumed(recipient)
    whole = LayerMap((RECIPIENT, number) for number in range(recipient.num_layers))
    before = _body(recipient, copy.deepcopy(recipient.model), whole, fields, stored, {})
    if blueprint is None:
        return before, None
    model = _with_layers(blueprint)
    if fields is not None:
        fields = _moved(recipient.config, blueprint)
    brought = _stored_of_donors(blueprint)
    return before, _body(recipient, model, blueprint.layer_map(), fields, stored, brought)


def _moved(config: PreTrainedConfig, blueprint: Blueprint) -> Mapping[str, Any]:
    found: Mapping[str, Any] = follow_quantization(config, blueprint).quantization_config
    return found


def _with_layers(blueprint: Blueprint) -> PreTrainedModel:
    """The recipient with the list of layers that run: each as it is in its source model."""
    model = copy.deepcopy(blueprint.recipient.model)
    origins = blueprint.origins(blueprint.running(()))
    parent, _, name = blueprint.recipient.stack_path.rpartition(".")
    layers = nn.ModuleList(copy.deepcopy(origin.anatomy.layers[origin.index]) for origin in origins)
    setattr(model.get_submodule(parent), name, layers)
    return model


def _body(
    recipient: Anatomy,
    model: PreTrainedModel,
    layer_map: LayerMap,
    fields: Mapping[str, Any] | None,
    stored: Mapping[str, int],
    brought: Mapping[tuple[str, int, str], int],
) -> Body:
    parameters = sum(parameter.numel() for _, parameter in _untied(model))
    kept = keep_precision(model, recipient.config.dtype)
    if fields is not None:
        pack_experts(model, fields)
    held = []
    for buffer, tensors in ((False, _untied(model)), (True, list(model.named_buffers()))):
        for name, tensor in tensors:
            layer = _layer_of(name, recipient.stack_path)
            slot = layer_map[layer] if layer is not None else None
            source = slot.source if slot is not None else RECIPIENT
            inside = name.removeprefix(f"{recipient.stack_path}.{layer}.")
            if slot is None:
                at_home = stored.get(name)
            elif source == RECIPIENT:
                at_home = stored.get(f"{recipient.stack_path}.{slot.index}.{inside}")
            else:
                at_home = brought.get((source, slot.index, inside))
            held.append(Held(name, tuple(tensor.shape), tensor.dtype, layer, source, at_home or 0, buffer))
    return Body(model, recipient.stack_path, layer_map, tuple(held), parameters, kept)


def _layer_of(name: str, stack_path: str) -> int | None:
    number, _, _ = name.removeprefix(f"{stack_path}.").partition(".")
    return int(number) if name.startswith(f"{stack_path}.") and number.isdecimal() and len(number) < 10 else None


def _untied(model: PreTrainedModel) -> Sequence[tuple[str, nn.Parameter]]:
    tied = model.all_tied_weights_keys
    return [(name, parameter) for name, parameter in model.named_parameters() if name not in tied]


def _stored_by_parameter(recipient: Anatomy, headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Bytes in the recipient's files by the parameter they are loaded into, found by Transformers' own renaming."""
    model = recipient.model
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = model.state_dict()
    tied = model.all_tied_weights_keys
    found: dict[str, int] = {}
    for name, header in headers.items():
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        found[renamed] = found.get(renamed, 0) + header.nbytes
    # Of tensors that share memory, a file may hold either.
    return _with_packed({**{tied[name]: size for name, size in found.items() if name in tied}, **found})


def _assumed(recipient: Anatomy) -> dict[str, int]:
    """The same where there are no headers: as the parameters are, experts as the configuration says of the files."""
    fields = getattr(recipient.config, "quantization_config", None)
    model = copy.deepcopy(recipient.model)
    if isinstance(fields, dict) and fields.get("quant_method") == "mxfp4":
        pack_experts(model, fields)
    return _with_packed({name: parameter.nbytes for name, parameter in _untied(model)})


def _stored_of_donors(blueprint: Blueprint) -> dict[tuple[str, int, str], int]:
    """Bytes in donors' files by donor, layer in its source model, and name inside the layer."""
    found: dict[tuple[str, int, str], int] = {}
    for part in blueprint.parts:
        names = LayerNames(part.anatomy.model, part.anatomy.stack_path)
        for name, info in part.donor.infos().items():
            number, rest = layer_of(name)
            index = part.donor.layer_indices[number]
            inside = names.inside_layer(f"{part.anatomy.stack_path}.{index}.{rest}") or rest
            key = (part.name, index, inside)
            found[key] = found.get(key, 0) + info.num_elements * loaded_dtype(info.dtype).itemsize
    for source, index, inside in list(found):
        whole = _unpacked(inside)
        if whole != inside:
            key = (source, index, whole)
            found[key] = found.get(key, 0) + found[source, index, inside]
    return found


def _with_packed(stored: dict[str, int]) -> dict[str, int]:
    """Count what is stored in two parts for the whole tensor too, which it becomes when it is dequantised."""
    wholes: dict[str, int] = {}
    for name, size in stored.items():
        if _unpacked(name) != name:
            wholes[_unpacked(name)] = wholes.get(_unpacked(name), 0) + size
    return {**wholes, **stored}


def _unpacked(name: str) -> str:
    return name.removesuffix(BLOCKS).removesuffix(SCALES)
