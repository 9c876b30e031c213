"""The demo: a recipient and a donor trained in minutes, on texts that every Python installation carries.

Example:
    >>> from pathlib import Path
    >>> from transplant_hf.demo import print_report, run_demo  # doctest: +SKIP
    >>> print_report(run_demo(Path("transplant-demo")))  # doctest: +SKIP
"""

from __future__ import annotations

from .budget import DemoBudget
from .report import DemoReport, print_report
from .run import run_demo

__all__ = ["DemoBudget", "DemoReport", "print_report", "run_demo"]
