"""Does a donor fit a recipient: every mismatch listed, from headers and configurations only."""

from .fit import donor_anatomy, mismatches, refuse_unsupported
from .report import CompatibilityReport

__all__ = ["CompatibilityReport", "donor_anatomy", "mismatches", "refuse_unsupported"]
