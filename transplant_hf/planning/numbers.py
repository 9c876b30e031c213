"""The type of numbers every parameter has after loading: the one asked for, but for what Transformers keeps."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..architecture import text_config
from ..donor.dtypes import loaded_dtype
from ..errors import ConfigurationError
from ..inspection.headers import TensorHeader

__all__ = ["BLOCKS", "SCALES", "asked_dtype", "dtype_name", "keep_precision", "pack_experts", "quantization"]

# How MXFP4 checkpoints name the two parts of a tensor: 16 bytes for 32 numbers, and a byte that scales them.
BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK = 32


def dtype_name(dtype: object) -> str:
    """Return a type's name without the library's.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def asked_dtype(config: PreTrainedConfig, dtype: str, headers: Mapping[str, TensorHeader]) -> PreTrainedConfig:
    """Return a configuration with the type of numbers that `from_pretrained(dtype=...)` would load.

    Args:
        config: The recipient's.
        dtype: Such as "bfloat16"; "auto" is what the configuration says, else what its first weights are in.
        headers: The recipient's weights.

    Raises:
        ConfigurationError: Not a type of floating-point numbers.
    """
    found = getattr(torch, dtype, None) if dtype != "auto" else _saved_dtype(config, headers)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigurationError(f'dtype must be "auto" or such as bfloat16, float16 or float32, got {dtype!r}.')
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, text_config(config).config)}.values():
        part.dtype = found
    return config


def _saved_dtype(config: PreTrainedConfig, headers: Mapping[str, TensorHeader]) -> torch.dtype:
    for part in (config, text_config(config).config):
        if isinstance(part.dtype, torch.dtype):
            return part.dtype
    types = (loaded_dtype(header.dtype) for header in headers.values())
    return next((found for found in types if found.is_floating_point), torch.float32)


def keep_precision(model: PreTrainedModel, dtype: object) -> tuple[str, ...]:
    """Give the parameters that Transformers itself keeps in float32 that type.

    Args:
        model: On the meta device; changed in place.
        dtype: The type asked for.

    Returns:
        The names that they are kept by.
    """
    kept: set[str] = set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    found = set()
    for name, parameter in model.named_parameters():
        by = next((key for key in sorted(kept) if re.search(key.replace("*", ".*"), name)), None)
        if by is not None:
            parameter.data = parameter.data.float()
            found.add(by)
    return tuple(sorted(found))


def quantization(config: PreTrainedConfig, dequantize: bool, what: str) -> dict[str, Any] | None:
    """Return how a recipient's files are quantised, if it is loaded so.

    Args:
        config: The recipient's.
        dequantize: Whether it is dequantised on loading.
        what: The recipient, for the message.

    Raises:
        ConfigurationError: In a way whose bytes are not known from a configuration.
    """
    fields = getattr(config, "quantization_config", None)
    if dequantize or not fields:
        return None
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = fields.get("quant_method")
    if method != "mxfp4":
        raise ConfigurationError(
            f"{what} is quantised with {method}; what that takes in memory is known to its own library. MXFP4 can be "
            "planned, and any recipient as if it were dequantised: dequantize=True, or --dequantize."
        )
    return fields


def pack_experts(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Put experts into the form of MXFP4 checkpoints, in place; layers that are to stay as they are stay so.

    Args:
        model: On the meta device.
        fields: Its `quantization_config`.
    """
    for path, module in list(model.named_modules()):
        experts = {n: p for n, p in module.named_parameters(recurse=False) if n.endswith("_proj") and p.dim() == 3}
        if not experts or not should_convert_module(path, fields.get("modules_to_not_convert")):
            continue
        for name, parameter in experts.items():
            count, inner, outer = parameter.shape  # the model multiplies from the left, files hold the transpose
            blocks = -(-inner // _BLOCK)
            delattr(module, name)
            for part, shape in (
                (BLOCKS, (count, outer, blocks, _BLOCK // 2)),
                (SCALES, (count, outer, blocks)),
            ):
                packed = torch.empty(shape, dtype=torch.uint8, device="meta")
                module.register_parameter(f"{name}{part}", nn.Parameter(packed, requires_grad=False))
