"""A transplant as a plain checkpoint, written as a stream; and what is on disk, checked and pushed."""

from .export import Export, export_transplant
from .push import Push, push_artefact

__all__ = ["Export", "Push", "export_transplant", "push_artefact"]
