"""Where pictures are drawn: matplotlib without a screen, one look for all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..outputs import check_output_file
from ..storage import writing

__all__ = ["COLOURS", "canvas", "check_picture"]

# Told apart by people with any kind of colour vision (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4419", "#999999", "#5B2A86")

_FORMATS = (".jpg", ".jpeg", ".pdf", ".png", ".svg")


def check_picture(path: Path, overwrite: bool = False) -> None:
    """Refuse a picture that could not be drawn, before the work whose result it would show.

    Args:
        path: The picture's file.
        overwrite: Replace the file if it exists.

    Raises:
        ConfigurationError: Its ending is of no known format, matplotlib is not installed, or the file exists or cannot
            be written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"a picture's name ends in one of {', '.join(_FORMATS)}; got {path}.")
    check_output_file(path, overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("drawing needs matplotlib: pip install matplotlib.")


@contextmanager
def canvas(path: Path, title: str, x: str, y: str, overwrite: bool = False) -> Iterator[Any]:
    """Draw a picture in a `with` block and write it when the block ends.

    Args:
        path: The file; its ending says the format.
        title: Above it.
        x: Below the horizontal axis.
        y: Beside the vertical one.
        overwrite: Replace the file if it exists.

    Yields:
        Matplotlib's axes.

    Raises:
        ConfigurationError: As in `check_picture`.
    """
    check_picture(path, overwrite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own: the global state of pyplot belongs to the caller.
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    yield axes
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
