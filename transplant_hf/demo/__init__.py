"""The demo: train a recipient and a donor in minutes, on texts that come with Python.

Example:
    >>> from pathlib import Path
    >>> from transplant_hf.demo import run_demo  # doctest: +SKIP
    >>> print(run_demo(Path("transplant-demo")))  # doctest: +SKIP
"""

from .run import DemoReport, DemoSettings, run_demo

__all__ = ["DemoReport", "DemoSettings", "run_demo"]
