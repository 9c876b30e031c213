"""What the tests of inspections share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from transplant_hf.inspection import Inspection

__all__ = ["count_of", "safetensors_bytes", "same_as_json", "size_of", "some_layers"]


def count_of(*files: Path) -> int:
    """How many numbers safetensors files hold, read by the library."""
    return sum(tensor.numel() for file in files for tensor in load_file(file).values())


def size_of(*files: Path) -> int:
    """The files' sizes together."""
    return sum(file.stat().st_size for file in files)


def same_as_json(found: Inspection) -> dict[str, Any]:
    """What an inspection is as JSON, once it went through a file's worth of it unchanged."""
    fields = found.to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    return fields


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def some_layers(count: int, width: int = 4) -> list[dict[str, torch.Tensor]]:
    """State dicts that belong to no architecture."""
    return [{"norm.weight": torch.ones(width), "mlp.weight": torch.ones(width, width)} for _ in range(count)]
