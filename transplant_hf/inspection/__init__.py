"""Say what a donor, a transplant, a model or a `.pt` file is, from headers and configurations alone."""

from .findings import (
    DonorInspection,
    FileFinding,
    Inspection,
    ModelInspection,
    PlacedDonor,
    PtInspection,
    TransplantInspection,
    Weights,
)
from .inspect import inspect

__all__ = [
    "DonorInspection",
    "FileFinding",
    "Inspection",
    "ModelInspection",
    "PlacedDonor",
    "PtInspection",
    "TransplantInspection",
    "Weights",
    "inspect",
]
