"""Compare donors with adapters and fine-tuning on the same text, at equal steps and at equal time."""

from .methods import METHODS, Method
from .report import ComparisonReport, ComparisonRow
from .runs import RunResult
from .study import compare

compare_texts = compare  # the old name, for one release

__all__ = ["METHODS", "ComparisonReport", "ComparisonRow", "Method", "RunResult", "compare", "compare_texts"]
