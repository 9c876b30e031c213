"""Files that `torch.save` wrote, read without unpickling: nothing in them can run."""

from .ptfile import PtFile
from .unpickle import StorageRef, TensorRef

__all__ = ["PtFile", "StorageRef", "TensorRef"]
