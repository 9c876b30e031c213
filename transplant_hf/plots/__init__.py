"""Pictures of measurements, as PNG or SVG files."""

from .canvas import check_picture
from .comparison import plot_comparison
from .strengths import check_strengths_picture, plot_strengths
from .sweep import plot_sweep

__all__ = ["check_picture", "check_strengths_picture", "plot_comparison", "plot_strengths", "plot_sweep"]
