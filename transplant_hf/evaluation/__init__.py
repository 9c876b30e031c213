"""How well a model predicts text: its perplexity, beside the untouched recipient's and at every position."""

from .dial import StrengthCurve, strength_curve
from .evaluate import evaluate
from .perplexity import Perplexity, document_perplexity, perplexity
from .report import EvaluationReport, EvaluationRow, SweepReport, SweepRow
from .sweep import sweep

__all__ = [
    "EvaluationReport",
    "EvaluationRow",
    "Perplexity",
    "StrengthCurve",
    "SweepReport",
    "SweepRow",
    "document_perplexity",
    "evaluate",
    "perplexity",
    "strength_curve",
    "sweep",
]
