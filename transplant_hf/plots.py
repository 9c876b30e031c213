"""Pictures of measurements, as PNG, SVG, PDF or JPEG files."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .storage import check_output_file, writing

if TYPE_CHECKING:
    from .comparison import ComparisonReport
    from .evaluation import StrengthCurve, SweepReport

__all__ = ["check_picture", "check_strengths_picture", "plot_comparison", "plot_hulls", "plot_strengths", "plot_sweep"]

# Distinct with any kind of color vision (Okabe and Ito, 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4419", "#999999", "#5B2A86")
_FORMATS = (".jpg", ".jpeg", ".pdf", ".png", ".svg")
_MAX_FORGETTING = 0.3  # in the picture of a comparison, in nats: runs that diverged are outside


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
        raise ConfigurationError(f"a curve is drawn on two texts, this one has {', '.join(texts)}.")
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
    """Draw a comparison at equal steps: gain against forgetting, and the hull of each method.

    Args:
        report: The result of `compare`.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in report.runs:
        if run.failed is None and run.steps == report.about["steps"] and run.gain is not None:
            share = f", {run.replay_share:.0%} replayed" if run.replay_share else ""
            curves.setdefault(f"{run.curve}{share}", []).append((run.gain, run.most_forgotten))
    plot_hulls(curves, path, overwrite)


def plot_hulls(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, overwrite: bool = False) -> None:
    """Draw pairs of gain and forgetting, and the best gain of each curve that forgets no more.

    Args:
        curves: The pairs, in nats, by label.
        path: The picture's file.
        overwrite: Replace the file if it exists.
    """
    forgetting = "forgetting, nats, on the other text where the loss rose most"
    with _axes(path, "What was learned and what was forgotten", forgetting, "gain, nats", overwrite) as axes:
        for number, (label, pairs) in enumerate(curves.items()):
            color = _COLORS[number % len(_COLORS)]
            points = sorted((forgotten, gain) for gain, forgotten in pairs)
            axes.scatter(*zip(*points, strict=True), color=color, s=14)
            best = itertools.accumulate((gain for _, gain in points), max)
            axes.step([forgotten for forgotten, _ in points], list(best), where="post", color=color, label=label)
        axes.set_xlim(right=min(axes.get_xlim()[1], _MAX_FORGETTING))
        axes.set_ylim(bottom=0)
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
