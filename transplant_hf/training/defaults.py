"""Learning rates and places that did best; docs/training.md shows the measurements."""

from __future__ import annotations

__all__ = ["default_learning_rate", "default_position", "default_strength"]

# Best of three on a validation split, for a Llama of width 192 (docs/training.md).
_MEASURED_WIDTH = 192
_LEARNING_RATES = {
    ("in_place", "insert"): 1e-2,
    ("in_place", "replace"): 1e-2,
    ("standalone", "insert"): 3e-3,
}


def default_learning_rate(method: str, mode: str, width: int) -> float:
    """Return the learning rate that did best, in proportion to 1 / width for models wider than the measured one.

    That proportion is the rule of maximal update parametrisation (arXiv 2203.03466) for Adam and hidden matrices; it
    was not measured here.

    Args:
        method: "in_place" or "standalone".
        mode: "insert" or "replace".
        width: The hidden size.

    Example:
        >>> default_learning_rate("in_place", "insert", 192), default_learning_rate("in_place", "insert", 768)
        (0.01, 0.0025)
    """
    return _LEARNING_RATES[method, mode] * min(1.0, _MEASURED_WIDTH / width)


def default_position(method: str, mode: str, num_layers: int, count: int) -> int:
    """Return where a donor does best: before the last layer; a replacing one in place of the last layers.

    Args:
        method: "in_place" or "standalone".
        mode: "insert" or "replace".
        num_layers: The recipient's L.
        count: The donor's k.

    Example:
        >>> default_position("in_place", "insert", 9, 3), default_position("in_place", "replace", 9, 3)
        (8, 6)
    """
    return max(num_layers - (count if mode == "replace" else 1), 0)


def default_strength(mode: str, replayed: bool) -> float:
    """Return the strength to recommend: all of it where general text was replayed, less where it was not."""
    return 1.0 if replayed or mode == "replace" else 0.75
