"""Values of options, checked while arguments are read: a wrong value is a usage error, before any work is done."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import DonorSpec

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


def donor_spec(text: str, mode: str | None = None) -> DonorSpec:
    """Read `DONOR@POSITION`, or `DONOR` for the position that the donor recommends; see `DonorSpec.parse`."""
    from ..config import DonorSpec

    return DonorSpec.parse(text, mode)


def layer_range(text: str) -> range:
    """Read the number of a layer, or the first and last number of several.

    Example:
        >>> layer_range("4"), layer_range("4-6")
        (range(4, 5), range(4, 7))
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    layers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not layers:
        raise argparse.ArgumentTypeError(f"must be layer numbers, such as 4 5 6 or 4-6, got {text!r}")
    return layers


class LayerNumbers(argparse.Action):
    """Store the numbers of one or several ranges of layers as one list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store them."""
        ranges: Sequence[range] = values
        setattr(namespace, self.dest, [number for layers in ranges for number in layers])


def whole(least: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers.

    Example:
        >>> whole()("3")
        3
    """

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


def dtype(text: str) -> str:
    """Read a dtype, by its name in torch or a common short name.

    Example:
        >>> dtype("bf16")
        'bfloat16'
    """
    name = torch_name(text)
    if name not in _KNOWN:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_KNOWN)}, or bf16, fp16, fp32, got {text!r}")
    return name


def torch_name(text: str) -> str:
    """Return torch's name of a dtype for a common short one.

    Example:
        >>> torch_name("fp16"), torch_name("float8_e4m3fn")
        ('float16', 'float8_e4m3fn')
    """
    return _DTYPES.get(text.lower(), text.lower())
