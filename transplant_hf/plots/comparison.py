"""Domain against general perplexity: a curve for each method, a point for each learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canvas import COLOURS, canvas

if TYPE_CHECKING:
    from ..comparison import ComparisonReport, RunResult

__all__ = ["plot_comparison"]

_FARTHEST = 6.0


def plot_comparison(report: ComparisonReport, path: Path) -> None:
    """Draw a comparison: one curve for each method, filled marks where general text was replayed.

    Args:
        report: What `compare` returned.
        path: The picture's file.
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
        path, "What was learnt and what was forgotten", f"perplexity, {domain}", f"perplexity, {general}"
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
        # Runs that went astray would squeeze all others into a corner.
        shown = [run.test[general] for runs in curves.values() for run in runs] + [untouched[general]]
        axes.set_ylim(min(shown) / 1.1, min(max(shown), _FARTHEST * untouched[general]) * 1.1)
        axes.legend(fontsize="small")


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
