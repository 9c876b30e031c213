"""Values of options, checked while arguments are read: a wrong value is a usage error, before any work is done."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16", "float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "f32", "float32"), "float32"),
    **dict.fromkeys(("fp64", "double", "float64"), "float64"),
    "auto": "auto",
}


class LayerNumbers(argparse.Action):
    """Store the numbers of one or several ranges of layers as one list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store them."""
        ranges: Sequence[range] = values
        setattr(namespace, self.dest, [number for layers in ranges for number in layers])


def layer_range(text: str) -> range:
    """Read the number of a layer, such as 4, or the first and last number of several, such as 4-6."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    layers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not layers:
        raise argparse.ArgumentTypeError(f"must be layer numbers, such as 4 5 6 or 4-6, got {text!r}")
    return layers


def whole(least: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"in {least}..{most:g}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    read.__name__ = "whole number"  # argparse puts it into its messages
    return read


def number(above: float = -math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers."""

    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value <= above:
            limit = "" if above == -math.inf else f" above {above:g}"
            raise argparse.ArgumentTypeError(f"must be a finite number{limit}, got {text}")
        return value

    read.__name__ = "number"
    return read


def share(text: str) -> float:
    """Read a share: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def any_dtype(text: str) -> str:
    """Return torch's name of a dtype for a common short one, and other names as they are."""
    return _DTYPES.get(text.lower(), text.lower())


def dtype(text: str) -> str:
    """Read the dtype of a model, by its name in torch or a common short name."""
    if text.lower() not in _DTYPES:
        known = ", ".join(dict.fromkeys(["auto", *_DTYPES.values()]))
        raise argparse.ArgumentTypeError(f"must be one of {known}, or bf16, fp16, fp32, got {text!r}")
    return any_dtype(text)
