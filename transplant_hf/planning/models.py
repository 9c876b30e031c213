"""The models of a plan, on the meta device: found by configurations and headers, and as they are after loading."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, decoder_stack, open_recipient, text_config
from ..config import DonorSpec, TransplantConfig, donor_specs
from ..donor import Donor, DonorRecord
from ..donor.tensors import MemoryTensors, loaded_dtype
from ..errors import ConfigurationError
from ..inspection.donors import open_donors, read_transplant_config
from ..inspection.files import MODEL_FILES, Files, all_tensors
from ..layer_map import RECIPIENT, Position, starting_layers, trained_placement
from ..sources import HubOptions, Source
from ..splice import Blueprint, draw_blueprint
from ..storage import read_json

__all__ = ["find_models", "loaded_model", "loaded_transplant", "quantization"]

# MXFP4 stores 32 numbers in 17 bytes: 16 for the numbers and one for their common scale.
_BLOCK, _BLOCK_BYTES = 32, 17


def find_models(
    what: str,
    donors: Any,
    count: int | None,
    position: Position | None,
    dtype: str,
    revision: str | None,
    hub: HubOptions,
    mode: str = "insert",
    late: bool = False,
) -> tuple[Source, Blueprint]:
    """Return where the recipient's configuration is, and the transplant, in the planned dtype; it may have no donors.

    The arguments are those of `plan`, and `late` is that of `trained_position`.
    """
    if donors and count:
        raise ConfigurationError("pass either donors, or the count of layers that do not exist yet.")
    if position is not None and not count:
        raise ConfigurationError(
            "a position is for new layers, and needs train or count (--train, --count); write a donor's as DONOR@P."
        )
    files = Files.find(what, hub, revision=revision)
    fields = read_json(files.source.folder / "config.json", "config.json") if files.has("config.json") else {}
    config = TransplantConfig(recipient=what, recipient_revision=files.source.revision, donors=donor_specs(donors))
    base: Source | None = None
    if fields.get("model_type") == TransplantConfig.model_type:
        config, base = read_transplant_config(fields, files.source), files.source
        if donors or count:
            raise ConfigurationError(
                f"{what} is a transplant already (recipient {config.recipient}). Name its recipient instead, with all "
                "donors together."
            )
    found = open_recipient(
        config.recipient, config.recipient_revision, hub, relative_to=base, overrides=config.recipient_overrides
    )
    anatomy = found.anatomy()
    recipient = dataclasses.replace(anatomy, config=_with_dtype(anatomy.config, dtype, found.source, hub))
    parts = [(opened.spec, opened.donor) for opened in open_donors(config, base, what, hub)]
    if count:
        parts = [_new_layers(recipient, count, position, mode, late)]
    if not parts:
        return found.source, Blueprint(recipient, config)
    config.donors = donor_specs([spec for spec, _ in parts])
    return found.source, draw_blueprint(recipient.model_class, recipient.config, parts, config)


def _new_layers(
    recipient: Anatomy, count: int, position: Position | None, mode: str, late: bool
) -> tuple[DonorSpec, Donor]:
    """Return a donor as `train` would start it from the recipient, in full precision."""
    placement = trained_placement(recipient.num_layers, count, mode, position, late=late)
    chosen = starting_layers(placement, recipient.num_layers)
    tensors = {
        f"layers.{number}.{name}": tensor
        for number, index in enumerate(chosen)
        for name, tensor in recipient.layers[index].state_dict().items()
    }
    record = DonorRecord(recipient.config.model_type, recipient.config.to_dict(), chosen)
    spec = DonorSpec("new-layers", placement.position, mode, name="donor")
    return spec, Donor(record, MemoryTensors(tensors))


def _with_dtype(config: PreTrainedConfig, dtype: str, source: Source, hub: HubOptions) -> PreTrainedConfig:
    """Return a configuration with the dtype that `from_pretrained(dtype=...)` would load the model in."""
    found = getattr(torch, dtype, None) if dtype != "auto" else _saved_dtype(config, source, hub)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigurationError(f'dtype must be "auto" or such as bfloat16, float16 or float32, got {dtype!r}.')
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, text_config(config))}.values():
        part.dtype = found
    return config


def _saved_dtype(config: PreTrainedConfig, source: Source, hub: HubOptions) -> torch.dtype:
    for part in (config, text_config(config)):
        if isinstance(part.dtype, torch.dtype):
            return part.dtype
    files = Files(source, hub)
    known = any(files.has(name) for name in MODEL_FILES)
    tensors = all_tensors(files.headers(MODEL_FILES)) if known else {}
    dtypes = (loaded_dtype(tensor.dtype) for tensor in tensors.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def loaded_model(anatomy: Anatomy, quantized: bool) -> PreTrainedModel:
    """Return a model as it is after loading, its tied weights tied and, if asked for, its experts in MXFP4."""
    model = copy.deepcopy(anatomy.model)
    model.tie_weights(recompute_mapping=False)
    fields = quantization(anatomy.config, anatomy.what) if quantized else None
    if fields is not None:
        _pack_experts(model, fields.get("modules_to_not_convert") or ())
    return model


def loaded_transplant(blueprint: Blueprint, quantized: bool) -> PreTrainedModel:
    """Return a transplant as it is after loading: donors stay in full precision, unless their files are in MXFP4."""
    path = blueprint.recipient.stack_path
    model = loaded_model(blueprint.recipient, quantized)
    stacks = {RECIPIENT: decoder_stack(model, path)}
    for part in blueprint.parts:
        is_packed = any(name.endswith(("_blocks", "_scales")) for name in part.donor.infos())
        source = loaded_model(part.anatomy, quantized and is_packed)
        stacks[part.name] = decoder_stack(source, part.anatomy.stack_path)
    parent, _, name = path.rpartition(".")
    layers = nn.ModuleList(stacks[source][index] for source, index in blueprint.layer_map())
    setattr(model.get_submodule(parent), name, layers)
    return model


def quantization(config: PreTrainedConfig, what: str) -> dict[str, Any] | None:
    """Return the `quantization_config` of a recipient, if it has one."""
    fields = getattr(config, "quantization_config", None)
    if not fields:
        return None
    found: dict[str, Any] = fields if isinstance(fields, dict) else fields.to_dict()
    method = found.get("quant_method")
    if method != "mxfp4":
        raise ConfigurationError(
            f"{what} is quantized with {method}, and only its library knows its size in memory. Plan it as if it were "
            "dequantized: dequantize=True, or --dequantize."
        )
    return found


def _pack_experts(model: PreTrainedModel, kept: Sequence[str]) -> None:
    """Replace matrices of experts by bytes of the size that they have in MXFP4, except in modules that are kept."""
    kept_modules = re.compile("|".join(rf"(?:{pattern})(?:\..*)?" for pattern in kept) or r"(?!)")
    for path, module in model.named_modules():
        if kept_modules.fullmatch(path):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name.endswith("_proj") and parameter.dim() == 3:
                experts, inner, outer = parameter.shape  # blocks run along the inner dimension
                size = experts * outer * -(-inner // _BLOCK) * _BLOCK_BYTES
                packed = torch.empty(size, dtype=torch.uint8, device="meta")
                setattr(module, name, nn.Parameter(packed, requires_grad=False))
