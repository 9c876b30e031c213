"""Position against perplexity, the untouched recipient as a line, the best position marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .canvas import COLOURS, canvas

if TYPE_CHECKING:
    from ..evaluation import SweepReport

__all__ = ["plot_sweep"]


def plot_sweep(report: SweepReport, path: Path, overwrite: bool = False) -> None:
    """Draw a sweep: a curve for each donor and strength.

    Args:
        report: What `sweep` returned.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    curves: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for row in report.rows:
        if row.perplexity is not None:
            curves.setdefault((row.donor, row.strength), []).append((row.position, row.perplexity.value))
    one_strength = len({strength for _, strength in curves}) == 1
    best = report.best
    with canvas(path, f"Where a donor does best, on {report.text}", "position", "perplexity", overwrite) as axes:
        axes.axhline(report.recipient.value, color="black", linestyle=":", label="recipient, untouched")
        for number, ((donor, strength), points) in enumerate(curves.items()):
            label = donor if one_strength else f"{donor}, strength {strength:g}"
            axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[number % len(COLOURS)], label=label)
        if best is not None and best.perplexity is not None:
            axes.plot(
                best.position,
                best.perplexity.value,
                marker="*",
                markersize=18,
                color="#E69F00",
                linestyle="",
                label=f"best: {best.perplexity.value:.1f} at {best.position}",
            )
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
