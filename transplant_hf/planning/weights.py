"""The models of a plan, on the meta device: parameters have the shapes and dtypes that they have after loading."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, decoder_stack
from ..display import dtype_name
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice import Blueprint, DonorPart

__all__ = ["loaded_model", "loaded_transplant", "quantization", "weights_by_dtype"]

# MXFP4 stores 32 numbers in 17 bytes: 16 for the numbers and one for their common scale.
_BLOCK, _BLOCK_BYTES = 32, 17


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
        source = loaded_model(part.anatomy, quantized and _is_packed(part))
        stacks[part.name] = decoder_stack(source, part.anatomy.stack_path)
    parent, _, name = path.rpartition(".")
    layers = nn.ModuleList(stacks[source][index] for source, index in blueprint.layer_map())
    setattr(model.get_submodule(parent), name, layers)
    return model


def weights_by_dtype(module: nn.Module) -> dict[str, int]:
    """Return the bytes of a module's parameters by dtype, tied ones counted once."""
    sizes: Counter[str] = Counter()
    for parameter in module.parameters():
        sizes[dtype_name(parameter.dtype)] += parameter.nbytes
    return dict(sizes)


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


def _is_packed(part: DonorPart) -> bool:
    return any(name.endswith(("_blocks", "_scales")) for name in part.donor.infos())


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
