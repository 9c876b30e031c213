"""`torch.save` files: read without running anything in them, and which of their tensors are which of a donor's."""

from .layouts import Layout, match_layers
from .pt_file import PtFile, PtTensor

__all__ = ["Layout", "PtFile", "PtTensor", "match_layers"]
