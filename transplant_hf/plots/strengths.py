"""The curve that a donor's strength gives: one text against another, a point for each strength."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .canvas import COLOURS, canvas, check_picture

if TYPE_CHECKING:
    from ..evaluation import StrengthCurve

__all__ = ["check_strengths_picture", "plot_strengths"]


def check_strengths_picture(path: Path, texts: Collection[str], overwrite: bool = False) -> None:
    """Refuse a curve of strengths that could not be drawn, before anything is measured.

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


def plot_strengths(curve: StrengthCurve, path: Path, overwrite: bool = False) -> None:
    """Draw a curve of strengths.

    Args:
        curve: What `strength_curve` returned, on two texts.
        path: The picture's file.
        overwrite: Replace the file if it exists.

    Raises:
        ConfigurationError: As in `check_strengths_picture`.
    """
    check_strengths_picture(path, curve.texts, overwrite)
    one, other = curve.texts
    points = [(point[one].value, point[other].value) for point in curve.points.values()]
    with canvas(
        path, f"Strength of {', '.join(curve.donors)}", f"perplexity, {one}", f"perplexity, {other}", overwrite
    ) as axes:
        axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[0])
        for strength, point in zip(curve.points, points, strict=True):
            axes.annotate(f"{strength:g}", point, textcoords="offset points", xytext=(6, 6))
