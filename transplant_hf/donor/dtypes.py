"""Data types, by the names that safetensors uses."""

from __future__ import annotations

import torch

from ..errors import CheckpointError

__all__ = ["loaded_dtype", "stored_dtype"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def stored_dtype(dtype: torch.dtype, name: str) -> str:
    """Return safetensors' name of a data type.

    Example:
        >>> stored_dtype(torch.bfloat16, "weight")
        'BF16'
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"donor tensor {name!r} has type {dtype}, which safetensors cannot store.")
    return _NAMES[dtype]


def loaded_dtype(stored: str) -> torch.dtype:
    """Return the data type with this name in safetensors."""
    if stored not in _DTYPES:
        raise CheckpointError(f"{stored!r} is not a data type of torch.")
    return _DTYPES[stored]
