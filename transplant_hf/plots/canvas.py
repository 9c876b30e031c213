"""Where pictures are drawn: matplotlib without a screen, one look for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..storage import writing

__all__ = ["COLOURS", "canvas"]

# Told apart by people with any kind of colour vision (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4419", "#999999", "#5B2A86")


@contextmanager
def canvas(path: Path, title: str, x: str, y: str) -> Iterator[Any]:
    """Draw a picture in a `with` block and write it when the block ends.

    Args:
        path: The file; its ending says the format.
        title: Above it.
        x: Below the horizontal axis.
        y: Beside the vertical one.

    Yields:
        Matplotlib's axes.

    Raises:
        ConfigurationError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("drawing needs matplotlib: pip install 'transplant_hf[plots]'.") from error
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
