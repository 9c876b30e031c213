"""The old name of `surface`, for one release."""

from .surface import TransplantMixin

__all__ = ["TransplantMixin"]
