"""The memory that a transplant needs, beside its untouched recipient: from configurations and headers alone."""

from ..display import parse_size
from .estimate import plan
from .results import CacheKind, Cost, Hardware, Plan, PlannedDonor, Share, TrainingCost

__all__ = ["CacheKind", "Cost", "Hardware", "Plan", "PlannedDonor", "Share", "TrainingCost", "parse_size", "plan"]
