"""Which tensors of a `.pt` file are which of a donor's: by names and shapes, held against the source model."""

from .match import Layout, Packed, match_layers

__all__ = ["Layout", "Packed", "match_layers"]
