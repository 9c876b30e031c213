"""`export`: a transplant as files that load without this package."""

from .checkpoint import export
from .result import Export

export_transplant = export  # the old name, for one release

__all__ = ["Export", "export", "export_transplant"]
