"""Values of options, checked while arguments are read: a wrong one is wrong usage, before any work is done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["dtype", "number", "share", "torch_name", "whole"]

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "fp32": "float32",
    "float": "float32",
    "f32": "float32",
    "fp64": "float64",
    "double": "float64",
}
_KNOWN = ("auto", *dict.fromkeys(_DTYPES.values()))


def whole(least: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers.

    Args:
        least: The least that is allowed.
        most: The most.

    Example:
        >>> whole()("3")
        3
    """

    def read(text: str) -> int:
        return int(_between(int(text), least, most))

    read.__name__ = "whole number"  # what argparse calls it
    return read


def number(above: float = -math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers.

    Args:
        above: They are larger than this.
    """

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


def dtype(text: str) -> str:
    """Read a type of numbers, under torch's name or a common short one.

    Example:
        >>> dtype("bf16")
        'bfloat16'
    """
    name = torch_name(text)
    if name not in _KNOWN:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_KNOWN)}, or bf16, fp16, fp32, got {text!r}")
    return name


def torch_name(text: str) -> str:
    """Return torch's name of a type of numbers for a common short one.

    Example:
        >>> torch_name("fp16"), torch_name("float8_e4m3fn")
        ('float16', 'float8_e4m3fn')
    """
    return _DTYPES.get(text.lower(), text.lower())


def _between(value: int, least: int, most: float) -> int:
    if not least <= value <= most:
        limit = f"at least {least}" if most == math.inf else f"in {least}..{most:g}"
        raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
    return value
