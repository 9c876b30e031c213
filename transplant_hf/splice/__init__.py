"""From configurations and headers to a plan, and from files to merged weights, in one pass."""

from .blueprint import Blueprint, DonorPart, draw_blueprint, report_fit
from .quantized import follow_quantization, quantization_beside_donors, renumber_metadata
from .surgery import insert_layers, renumber, use_config
from .weights import MergedWeights, Provenance, checkpoint_files, merge_weights, open_checkpoint

__all__ = [
    "Blueprint",
    "DonorPart",
    "MergedWeights",
    "Provenance",
    "checkpoint_files",
    "draw_blueprint",
    "follow_quantization",
    "insert_layers",
    "merge_weights",
    "open_checkpoint",
    "quantization_beside_donors",
    "renumber",
    "renumber_metadata",
    "report_fit",
    "use_config",
]
