"""Types of numbers under the names that safetensors gives them."""

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
    """Return the name of a tensor's type.

    Raises:
        CheckpointError: Safetensors files cannot hold it.

    Example:
        >>> stored_dtype(torch.bfloat16, "weight")
        'BF16'
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"donor tensor {name!r} is of type {dtype}, which safetensors files cannot hold.")
    return _NAMES[dtype]


def loaded_dtype(stored: str) -> torch.dtype:
    """Return the type that a safetensors file's name of it means.

    Raises:
        CheckpointError: Not a name that torch knows.
    """
    if stored not in _DTYPES:
        raise CheckpointError(f"{stored!r} is not a type of numbers that torch knows.")
    return _DTYPES[stored]
