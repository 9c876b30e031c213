"""What a transplant costs on given hardware, beside its untouched recipient: from headers and the meta device alone."""

from ..display import parse_size
from .cost import CacheKind, Cost, Plan, Reading, Share
from .hardware import Hardware
from .plan import plan

__all__ = ["CacheKind", "Cost", "Hardware", "Plan", "Reading", "Share", "parse_size", "plan"]
