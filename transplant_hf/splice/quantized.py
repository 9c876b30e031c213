"""Quantized recipients: layer numbers in their files and configuration follow the layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import LayerNames
from ..layer_map import RECIPIENT
from .blueprint import Blueprint

# Where quantizers keep the names of modules that stay in full precision.
SKIP_FIELDS = ("modules_to_not_convert", "llm_int8_skip_modules")
# Words in the names of tensors that hold quantized weights, or what is needed to read them.
QUANTIZED = ("qdata", "_blocks", "_scales", "scale_inv", "absmax", "qweight", "qzeros", "weight_scale")


def follow_quantization(config: PreTrainedConfig, blueprint: Blueprint) -> PreTrainedConfig:
    """Keep full-precision donors in full precision in a recipient whose files are quantized."""
    fields = getattr(config, "quantization_config", None)
    if not isinstance(fields, dict):
        return config
    packed = [any(marker in name for name in part.donor.infos() for marker in QUANTIZED) for part in blueprint.parts]
    plain = {part.name for part, is_packed in zip(blueprint.parts, packed, strict=True) if not is_packed}
    config = copy.deepcopy(config)
    config.quantization_config = _renumbered(fields, blueprint, plain)
    return config


def quantization_beside_donors(config: Any, blueprint: Blueprint, quantized: Collection[str] = ()) -> Any:
    """Return the quantization of a recipient that is quantized while it is loaded; of donors, only for some."""
    donors = {part.name for part in blueprint.parts} - set(quantized)
    if isinstance(config, dict):
        return _renumbered(config, blueprint, donors)
    return type(config).from_dict(_renumbered(config.to_dict(), blueprint, donors))


def _renumbered(fields: Mapping[str, Any], blueprint: Blueprint, full_precision: Collection[str]) -> dict[str, Any]:
    """Let the names of modules that are not quantized follow the layers, and add those of donors."""
    path = blueprint.recipient.stack_path
    kept = [f"{path}.{n}" for n, stage in enumerate(blueprint.built) if stage.slot.source in full_precision]
    names = LayerNames(blueprint.recipient.model, path, [])
    made: dict[str, Any] = copy.deepcopy(dict(fields))
    for field in SKIP_FIELDS:
        listed = made.get(field)
        if listed is not None:
            made[field] = [*(moved for name in listed for moved in _moved(name, names, blueprint)), *kept]
        elif field in fields or (field == SKIP_FIELDS[0] and not any(f in fields for f in SKIP_FIELDS)):
            # Without a list, the quantizer chooses; a list with any module replaces its choice.
            made[field] = [*_kept_by_default(blueprint.recipient.model), *kept]
    return made


def _kept_by_default(model: PreTrainedModel) -> list[str]:
    """The modules that quantizers keep in full precision if no list says: the head, and modules with tied weights."""
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if head is not None and module is head]
    tied = [*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()]
    last = [name for name, _ in model.named_parameters()][-1:]
    return list(dict.fromkeys(name.removesuffix(".weight") for name in (*tied, *last, *heads)))


def _moved(name: str, names: LayerNames, blueprint: Blueprint) -> list[str]:
    """A module's name after renumbering; empty if its layer is gone, unchanged if it names no single layer."""
    parts, places = names.split(f"{name}.weight"), _places(blueprint)
    if parts is None:
        return [name]
    return [parts.at(places[parts.number]).removesuffix(".weight")] if parts.number in places else []


def _places(blueprint: Blueprint) -> dict[int, int]:
    return {stage.slot.index: n for n, stage in enumerate(blueprint.built) if stage.slot.source == RECIPIENT}


def renumber_metadata(metadata: Mapping[str, str], names: LayerNames, blueprint: Blueprint) -> dict[str, str]:
    """Renumber the records that torchao writes into the header of a safetensors file for each quantized parameter."""
    places = _places(blueprint)
    moved: dict[str, str] = {}
    for key, value in metadata.items():
        parts = names.split(key)
        if parts is None:
            moved[key] = value
        elif parts.number in places:
            moved[parts.at(places[parts.number])] = value
    if "tensor_names" in metadata:
        listed = [names.split(name) or name for name in json.loads(metadata["tensor_names"])]
        kept = [name for name in listed if isinstance(name, str) or name.number in places]
        moved["tensor_names"] = json.dumps([n if isinstance(n, str) else n.at(places[n.number]) for n in kept])
    return moved
