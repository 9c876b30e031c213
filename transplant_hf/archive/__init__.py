"""Files that `torch.save` wrote, read without unpickling: nothing in them can run."""

from .descriptions import StorageRef, TensorRef
from .ptfile import PtFile, PtTensor

__all__ = ["PtFile", "PtTensor", "StorageRef", "TensorRef"]
