"""From configurations and headers to a plan, and from files to merged weights, in one pass."""

from .blueprint import Blueprint, DonorPart, draw_blueprint, report_fit
from .surgery import insert_layers, renumber, use_config
from .weights import MergedWeights, merge_weights, open_checkpoint

__all__ = [
    "Blueprint",
    "DonorPart",
    "MergedWeights",
    "draw_blueprint",
    "insert_layers",
    "merge_weights",
    "open_checkpoint",
    "renumber",
    "report_fit",
    "use_config",
]
