"""Pictures of measurements, as PNG or SVG files."""

from .comparison import plot_comparison
from .strengths import plot_strengths
from .sweep import plot_sweep

__all__ = ["plot_comparison", "plot_strengths", "plot_sweep"]
