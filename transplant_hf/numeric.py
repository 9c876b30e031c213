"""Numbers as users write them: those of Python, numpy and torch; what comes back is Python's own, as JSON has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, TypeGuard

from .errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = [
    "consecutive_layers",
    "finite_number",
    "is_finite",
    "is_number",
    "is_whole",
    "plain_number",
    "shown",
    "whole_number",
]

# Beyond it a number counts nothing here, and Python refuses to print one of a few thousand digits.
_MOST = 1 << 63
_MOST_SHOWN = 200


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of Python, in a range where numbers count something; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -_MOST < value < _MOST


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number of Python; `True` is none."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and type holds neither NaN nor infinity; nothing of its size is allocated.

    Example:
        >>> import torch
        >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


def plain_number(value: Any) -> Any:
    """Return the Python number that an array or tensor without dimensions holds, and anything else as it is."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or getattr(value, "is_meta", False):
        return value
    return value.item()


def whole_number(value: Any, what: str) -> int:
    """Accept a whole number of any library.

    Args:
        value: What the user gave.
        what: What it is, for the message.

    Raises:
        ConfigurationError: Anything else; neither `True` nor 1.0 is one.

    Example:
        >>> import torch
        >>> whole_number(torch.tensor(3), "position")
        3
    """
    found = plain_number(value)
    if not is_whole(found):
        raise ConfigurationError(f"{what} must be a whole number, got {shown(value)}.")
    return int(found)


def finite_number(value: Any, what: str) -> float:
    """Accept a finite number of any library.

    Args:
        value: What the user gave.
        what: What it is, for the message.

    Raises:
        ConfigurationError: Anything else; `True` is none.

    Example:
        >>> finite_number(2, "strength")
        2.0
    """
    found = plain_number(value)
    if not is_number(found):
        raise ConfigurationError(f"{what} must be a finite number, got {shown(value)}.")
    return float(found)


def consecutive_layers(values: Any, what: str, example: str = "[4, 5, 6]") -> list[int]:
    """Accept consecutive layer numbers: a list, range, set, array or tensor of them.

    Args:
        values: What the user gave.
        what: What they are, for the message.
        example: What they may look like.

    Raises:
        ConfigurationError: None, other things than whole numbers, or gaps between them.

    Example:
        >>> consecutive_layers(range(4, 6), "layers")
        [4, 5]
    """
    found: list[int] = []
    listed: list[Any] | None = None
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if several and getattr(values, "ndim", None) != 0:
        listed = list(values)
        found = [int(number) for number in map(plain_number, listed) if is_whole(number)]
        found = sorted(found) if isinstance(values, Set) else found
        found = found if len(found) == len(listed) else []
    if not found or found != list(range(found[0], found[0] + len(found))):
        must = "consecutive" if found or listed == [] else "whole numbers, and consecutive"
        raise ConfigurationError(f"{what} must be {must}, such as {example}, got {shown(values)}.")
    return found


def shown(value: Any) -> str:
    """Return a value for a message: short, and where Python refuses to print it, its type."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
