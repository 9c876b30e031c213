"""The old home of `export_transplant` and `push_artefact`, for one release; use `exporting` and `pushing`.

`transplant_hf.export` is also the name of a function. Python binds a submodule to its package under its own name
when it is imported, so this module is callable: `transplant_hf.export(...)` works whichever was imported first.
"""

import inspect
import sys
from types import ModuleType

from .exporting import Export, export, export_transplant
from .pushing import Push, push_artefact

__all__ = ["Export", "Push", "export_transplant", "push_artefact"]


class _CallableModule(ModuleType):
    __call__ = staticmethod(export)
    __signature__ = inspect.signature(export)


sys.modules[__name__].__class__ = _CallableModule
