"""The errors of transplant_hf: one root, seven kinds.

They do not derive from `ValueError` or `OSError` on purpose: `transformers.pipeline` catches those while it tries
several classes and would bury the sentence that tells the user what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from huggingface_hub.errors import StrictDataclassError

__all__ = [
    "BUILD_ERRORS",
    "CheckpointError",
    "CompatibilityError",
    "ConfigurationError",
    "DataError",
    "HubError",
    "IntegrityError",
    "TrainingError",
    "TransplantError",
]


# What model and configuration classes raise for a configuration they cannot build. Their own code decides, so the
# list is wide; a failure is never swallowed, it becomes the reason why a candidate was rejected.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


class TransplantError(Exception):
    """Root of all errors that transplant_hf raises on purpose."""


class ConfigurationError(TransplantError):
    """A configuration that cannot be applied: a position out of range, an unknown field, a newer format."""


class CompatibilityError(TransplantError):
    """Donor and recipient do not fit together.

    Args:
        message: What the user reads.
        mismatches: Every mismatch that was found, one line each.
    """

    def __init__(self, message: str, mismatches: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.mismatches: tuple[str, ...] = tuple(mismatches)


class CheckpointError(TransplantError):
    """Weights that are malformed, cut short, missing, mis-shaped, unsafe or not finite, or could not be written."""


class IntegrityError(CheckpointError):
    """Bytes on disk differ from the sha256 or size recorded for them."""


class HubError(TransplantError):
    """A repository is missing, gated, private or out of reach; the client's exception is the `__cause__`."""


class DataError(TransplantError):
    """Text that cannot be trained or measured on."""


class TrainingError(TransplantError):
    """Training that cannot go on; checkpoints that were written before are as they were."""
