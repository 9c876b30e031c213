"""How sizes, layer numbers, tables and progress are shown to a person."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tqdm import tqdm

from .errors import ConfigurationError

_MAX_LISTED = 6  # a longer run of consecutive numbers is shown as a range
_MAX_LISTED_NUMBERS = 12
_MAX_NAMES = 3
_PROGRESS_DELAY = 1.0  # seconds: work that is shorter shows no bar
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)", re.IGNORECASE)


def bytes_text(count: int) -> str:
    """Return a size in bytes with its unit, such as "81.1 MiB" or "812 bytes"."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Return layer numbers as a short list or a range, such as "4, 5, 6" or "0..23"."""
    if len(numbers) > _MAX_LISTED and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}..{numbers[-1]}"
    listed = ", ".join(map(str, numbers[:_MAX_LISTED_NUMBERS]))
    hidden = len(numbers) - _MAX_LISTED_NUMBERS
    return f"{listed}, ... and {hidden} more" if hidden > 0 else listed or "none"


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of torch, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def some_of(names: Collection[str]) -> str:
    """Return the first few names in alphabetical order, and how many others there are: "a, b, c and 1 more"."""
    listed = ", ".join(sorted(names)[:_MAX_NAMES])
    return listed if len(names) <= _MAX_NAMES else f"{listed} and {len(names) - _MAX_NAMES} more"


def position_text(position: int | Sequence[int]) -> str:
    """Return a donor's position, or its positions, as text: "position 3" or "positions 10, 20, 29"."""
    return f"position{'' if isinstance(position, int) else 's'} {position_numbers(position)}"


def position_numbers(position: int | Sequence[int]) -> str:
    """Return the numbers alone, such as "3" or "10, 20, 29"."""
    return str(position) if isinstance(position, int) else ", ".join(map(str, position))


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the cells of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def parse_size(text: str | int, what: str = "size") -> int:
    """Read a number of bytes, or of bytes in a second.

    Args:
        text: A number with its unit, such as "80GiB" (1024 to the third), "80GB" (1000 to the third), "2GB/s" or
            "512B"; or a number of bytes.
        what: What the size is, for the error message.

    Raises:
        ConfigurationError: Not a size, or a text without a unit.

    Example:
        >>> parse_size("80GiB"), parse_size("2GB/s"), parse_size("512B"), parse_size(512)
        (85899345920, 2000000000, 512, 512)
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip().removesuffix("/s"))
    if match is None:
        raise ConfigurationError(
            f"{what} must be a number with its unit, such as 80GiB, 80GB or 2GB/s (512B for bytes), got {text!r}."
        )
    number, unit, binary = match.groups()
    power = "KMGT".find(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def progress_bar(total: int | None, description: str, *, unit: str = "B", quiet: bool = False) -> Any:
    """Return a progress bar on standard error that appears after one second."""
    scale, delay = unit == "B", _PROGRESS_DELAY
    return tqdm(total=total, desc=description, unit=unit, unit_scale=scale, delay=delay, disable=quiet, leave=False)
