"""Domain against general perplexity: a curve for each method, a point for each learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canvas import COLOURS, canvas

if TYPE_CHECKING:
    from ..comparison import ComparisonReport, RunResult

__all__ = ["plot_comparison"]

# Runs that went astray would squeeze all others into a corner: how far beyond the untouched recipient is shown.
_FARTHEST_LEARNT, _FARTHEST_FORGOTTEN = 1.2, 6.0


def plot_comparison(report: ComparisonReport, path: Path, overwrite: bool = False) -> None:
    """Draw a comparison: one curve for each method, filled marks where general text was replayed.

    Args:
        report: What `compare` returned.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    domain, general = list(report.rows[0].result.test)[:2]
    untouched = report.rows[0].result.test
    steps = report.about["steps"]
    curves: dict[tuple[str, str, float], list[RunResult]] = {}
    for run in report.runs:
        if run.failed is None and run.steps == steps:
            curves.setdefault((run.method, run.view, run.share), []).append(run)
    names = list(dict.fromkeys((method, view) for method, view, _ in curves))
    with canvas(
        path,
        "What was learnt and what was forgotten",
        f"perplexity, {domain}",
        f"perplexity, {general}",
        overwrite,
    ) as axes:
        axes.scatter(
            untouched[domain], untouched[general], marker="*", s=160, color="black", label="recipient, untouched"
        )
        for (method, view, share), runs in curves.items():
            _curve(
                axes, runs, domain, general, COLOURS[names.index((method, view)) % len(COLOURS)], method, view, share
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        runs = [run for curve in curves.values() for run in curve]
        axes.set_xlim(*_limits([run.test[domain] for run in runs], untouched[domain], _FARTHEST_LEARNT))
        axes.set_ylim(*_limits([run.test[general] for run in runs], untouched[general], _FARTHEST_FORGOTTEN))
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _limits(values: list[float], untouched: float, farthest: float) -> tuple[float, float]:
    return min([*values, untouched]) / 1.1, min(max([*values, untouched]), farthest * untouched) * 1.1


def _curve(
    axes: Any, runs: list[RunResult], domain: str, general: str, colour: str, method: str, view: str, share: float
) -> None:
    runs = sorted((run for run in runs if math.isfinite(run.test[general])), key=lambda run: run.learning_rate)
    label = f"{method}{f', {view}' if view else ''}{f', replay {share:g}' if share else ''}"
    axes.plot(
        [run.test[domain] for run in runs],
        [run.test[general] for run in runs],
        marker="o",
        linestyle="-" if share else "--",
        color=colour,
        markerfacecolor=colour if share else "white",
        label=label,
    )
