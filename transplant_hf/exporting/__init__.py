"""A transplant as a plain checkpoint, which loads without this package."""

from .export import Export, export, export_transplant

__all__ = ["Export", "export", "export_transplant"]
