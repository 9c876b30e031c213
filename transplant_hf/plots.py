"""Pictures of measurements, as PNG, SVG, PDF or JPEG files."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .storage import check_output_file, writing

if TYPE_CHECKING:
    from .comparison import ComparisonReport, RunResult
    from .evaluation import StrengthCurve, SweepReport

__all__ = ["check_picture", "check_strengths_picture", "plot_comparison", "plot_strengths", "plot_sweep"]

# Distinct with any kind of color vision (Okabe and Ito, 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4419", "#999999", "#5B2A86")
_FORMATS = (".jpg", ".jpeg", ".pdf", ".png", ".svg")
# The axes of a comparison end at this multiple of the untouched recipient: runs that diverged are outside.
_MAX_DOMAIN, _MAX_GENERAL = 1.2, 6.0


def check_picture(path: Path, overwrite: bool = False) -> None:
    """Refuse a picture that cannot be drawn, before the work whose result it shows.

    Args:
        path: The picture's file.
        overwrite: Replace the file if it exists.

    Raises:
        ConfigurationError: An unknown format, matplotlib is not installed, or the file exists or cannot be written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"a picture's name ends in one of {', '.join(_FORMATS)}; got {path}.")
    check_output_file(path, overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("drawing needs matplotlib: pip install matplotlib.")


def check_strengths_picture(path: Path, texts: Collection[str], overwrite: bool = False) -> None:
    """Refuse a curve of strengths that cannot be drawn, before anything is measured.

    Args:
        path: The picture's file.
        texts: The texts' names.
        overwrite: Replace the file if it exists.

    Raises:
        ConfigurationError: It is not on two texts, or as in `check_picture`.
    """
    if len(texts) != 2:
        raise ConfigurationError(f"a curve is drawn on two texts, this one is on {', '.join(texts)}.")
    check_picture(path, overwrite)


def plot_sweep(report: SweepReport, path: Path, overwrite: bool = False) -> None:
    """Draw a sweep: position against perplexity, a curve for each donor and strength.

    Args:
        report: The result of `sweep`.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    curves: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for row in report.rows:
        if row.perplexity is not None:
            curves.setdefault((row.donor, row.strength), []).append((row.position, row.perplexity.value))
    one_strength = len({strength for _, strength in curves}) == 1
    best = report.best
    with _axes(path, f"Where a donor does best, on {report.text}", "position", "perplexity", overwrite) as axes:
        axes.axhline(report.recipient.value, color="black", linestyle=":", label="recipient, untouched")
        for number, ((donor, strength), points) in enumerate(curves.items()):
            label = donor if one_strength else f"{donor}, strength {strength:g}"
            axes.plot(*zip(*points, strict=True), marker="o", color=_COLORS[number % len(_COLORS)], label=label)
        if best is not None and best.perplexity is not None:
            label = f"best: {best.perplexity.value:.1f} at {best.position}"
            point = (best.position, best.perplexity.value)
            axes.plot(*point, marker="*", markersize=18, color=_COLORS[4], linestyle="", label=label)
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")


def plot_strengths(curve: StrengthCurve, path: Path, overwrite: bool = False) -> None:
    """Draw a curve of strengths: one text against the other, a point for each strength.

    Args:
        curve: The result of `strength_curve`, on two texts.
        path: The picture's file.
        overwrite: Replace the file if it exists.

    Raises:
        ConfigurationError: As in `check_strengths_picture`.
    """
    check_strengths_picture(path, curve.texts, overwrite)
    one, other = curve.texts
    points = [(point[one].value, point[other].value) for point in curve.points.values()]
    title = f"Strength of {', '.join(curve.donors)}"
    with _axes(path, title, f"perplexity, {one}", f"perplexity, {other}", overwrite) as axes:
        axes.plot(*zip(*points, strict=True), marker="o", color=_COLORS[0])
        for strength, point in zip(curve.points, points, strict=True):
            axes.annotate(f"{strength:g}", point, textcoords="offset points", xytext=(6, 6))


def plot_comparison(report: ComparisonReport, path: Path, overwrite: bool = False) -> None:
    """Draw a comparison: domain against general perplexity, a curve for each method, a point for each learning rate.

    Args:
        report: The result of `compare`.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    untouched = report.rows[0].result.test
    domain, general = list(untouched)[:2]
    curves: dict[tuple[str, str, float], list[RunResult]] = {}
    for run in report.runs:
        if run.failed is None and run.steps == report.about["steps"] and math.isfinite(run.test[general]):
            curves.setdefault((run.method, run.view, run.replay_share), []).append(run)
    names = list(dict.fromkeys((method, view) for method, view, _ in curves))
    title = "What was learned and what was forgotten"
    with _axes(path, title, f"perplexity, {domain}", f"perplexity, {general}", overwrite) as axes:
        point = (untouched[domain], untouched[general])
        axes.scatter(*point, marker="*", s=160, color="black", label="recipient, untouched")
        for (method, view, share), runs in curves.items():
            runs = sorted(runs, key=lambda run: run.learning_rate)
            color = _COLORS[names.index((method, view)) % len(_COLORS)]
            axes.plot(
                [run.test[domain] for run in runs],
                [run.test[general] for run in runs],
                marker="o",
                linestyle="-" if share else "--",
                color=color,
                markerfacecolor=color if share else "white",
                label=f"{method}{f', {view}' if view else ''}{f', replay {share:g}' if share else ''}",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for text, set_limits, most in ((domain, axes.set_xlim, _MAX_DOMAIN), (general, axes.set_ylim, _MAX_GENERAL)):
            values = [untouched[text], *(run.test[text] for runs in curves.values() for run in runs)]
            set_limits(min(values) / 1.1, min(max(values), most * untouched[text]) * 1.1)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


@contextmanager
def _axes(path: Path, title: str, x: str, y: str, overwrite: bool) -> Iterator[Any]:
    """Yield matplotlib's axes, and write the picture when the block ends."""
    check_picture(path, overwrite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own: the global state of pyplot belongs to the caller.
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    yield axes
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
