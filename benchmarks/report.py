"""Numbers to tables: medians, spreads, ratios to a reference, and the facts about versions and machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Comparison", "compare", "facts", "header", "table"]

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One measured thing beside its reference.

    Args:
        median: Of its values.
        low: The smallest.
        high: The largest.
        ratio: Its median by the reference's median.
        paired: The median of the ratios inside each round.
        paired_low: The smallest of them.
        paired_high: The largest.
    """

    median: float
    low: float
    high: float
    ratio: float
    paired: float
    paired_low: float
    paired_high: float

    @property
    def cells(self) -> list[str]:
        """Its columns in a table: median, spread, ratio of medians, paired ratios."""
        return [
            f"{self.median:.3f}",
            f"{self.low:.3f} - {self.high:.3f}",
            f"{self.ratio:.3f}",
            f"{self.paired:.3f} ({self.paired_low:.2f} - {self.paired_high:.2f})",
        ]


def compare(values: Sequence[float], reference: Sequence[float]) -> Comparison:
    """Compare values with those of the reference in the same rounds.

    Args:
        values: One for each round.
        reference: The same.

    Example:
        >>> compare([2.0, 3.0, 4.0], [1.0, 2.0, 4.0]).ratio
        1.5
    """
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    return Comparison(
        statistics.median(values),
        min(values),
        max(values),
        statistics.median(values) / statistics.median(reference),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a table that is also Markdown.

    Args:
        head: Names of the columns.
        rows: The cells; all but the first are aligned right.
    """
    widths = [max(len(row[number]) for row in (head, *rows)) for number in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def facts(threads: int) -> dict[str, Any]:
    """Return versions and what is known of the machine; no names and no folders.

    Args:
        threads: How many threads torch may use; 0 for its own choice.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    from transplant_hf import __version__

    return {
        "versions": {"transplant_hf": __version__, **versions},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": round(os.getloadavg()[0], 1),
            "torch_threads": threads or "torch's own choice",
        },
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def header(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Write `facts` as two lines."""
    return "\n".join(
        f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in part.items())
        for name, part in known.items()
    )
