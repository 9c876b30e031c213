"""Numbers of users and files: those of Python, numpy and torch are accepted, Python's are returned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, TypeGuard

from .errors import ConfigurationError

if TYPE_CHECKING:
    import torch

_MAX = 1 << 63  # a larger number is never a count, and Python does not print one of thousands of digits
_MAX_SHOWN = 200


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an `int` of at most 63 bits; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool) and -_MAX < value < _MAX


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite `int` or `float`; `True` is not."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and type holds neither NaN nor infinity; nothing of its size is allocated."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


def plain_number(value: Any) -> Any:
    """Return the Python number in an array or tensor without dimensions; other values as they are."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or getattr(value, "is_meta", False):
        return value
    return value.item()


def whole_number(value: Any, what: str) -> int:
    """Return a whole number of any library as an `int`."""
    found = plain_number(value)
    if not is_whole(found):
        raise ConfigurationError(f"{what} must be a whole number, got {shown(value)}.")
    return int(found)


def finite_number(value: Any, what: str) -> float:
    """Return a finite number of any library as a `float`."""
    found = plain_number(value)
    if not is_number(found):
        raise ConfigurationError(f"{what} must be a finite number, got {shown(value)}.")
    return float(found)


def ascending_layers(
    values: Any, what: str, example: str = "[4, 5, 6]", kind: str = "in ascending order", count: int | None = None
) -> list[int]:
    """Return layer numbers in ascending order, each from 0 to `count` - 1, as a list."""
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    several = several and getattr(values, "ndim", None) != 0
    numbers: list[Any] = [plain_number(value) for value in values] if several else [None]
    if not all(map(is_whole, numbers)):
        raise ConfigurationError(f"{what} must be whole numbers, and {kind}, such as {example}, got {shown(values)}.")
    numbers = sorted(numbers) if isinstance(values, Set) else numbers
    if not numbers or numbers != sorted(set(numbers)):
        raise ConfigurationError(f"{what} must be {kind}, such as {example}, got {shown(values)}.")
    if numbers[0] < 0 or (count is not None and numbers[-1] >= count):
        within = "0 or more" if count is None else f"in 0..{count - 1}, there are {count} layers"
        raise ConfigurationError(f"{what} must be {within}, got {shown(numbers)}.")
    return [int(number) for number in numbers]


def consecutive_layers(values: Any, what: str, example: str = "[4, 5, 6]", count: int | None = None) -> list[int]:
    """Return consecutive layer numbers, each from 0 to `count` - 1, as a list."""
    numbers = ascending_layers(values, what, example, "consecutive", count)
    if numbers[-1] - numbers[0] >= len(numbers):
        raise ConfigurationError(f"{what} must be consecutive, such as {example}, got {shown(values)}.")
    return numbers


def shown(value: Any) -> str:
    """Return a value as short text for a message."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
