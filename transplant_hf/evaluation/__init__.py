"""Perplexity of a model, of the untouched recipient, and of a donor at every position and strength."""

from .losses import Perplexity, document_perplexity, perplexity
from .measurement import evaluate, strength_curve
from .positions import sweep
from .reports import EvaluationReport, EvaluationRow, StrengthCurve, SweepReport, SweepRow

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
