"""Donors beside adapters and fine-tuning, on the same text, at equal steps and at equal time."""

from .methods import METHODS, Method
from .report import ComparisonReport, ComparisonRow
from .runs import Budget, Held, RunResult
from .study import compare, compare_texts

__all__ = [
    "METHODS",
    "Budget",
    "ComparisonReport",
    "ComparisonRow",
    "Held",
    "Method",
    "RunResult",
    "compare",
    "compare_texts",
]
