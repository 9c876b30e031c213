"""Whether a donor fits a recipient: all mismatches, from headers and configurations only."""

from .fit import donor_anatomy, mismatches, refuse_unsupported
from .report import CompatibilityReport

__all__ = ["CompatibilityReport", "donor_anatomy", "mismatches", "refuse_unsupported"]
