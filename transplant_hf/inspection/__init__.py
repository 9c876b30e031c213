"""What a donor, a transplant, a model or a `.pt` file is, from headers and configurations."""

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
from .inspecting import inspect

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
