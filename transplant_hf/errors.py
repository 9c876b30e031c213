"""The errors of transplant_hf, all derived from `TransplantError`.

They do not derive from `ValueError` or `OSError`: `transformers.pipeline` catches these while it tries several classes,
and the user would not see the message.
"""

from __future__ import annotations

from collections.abc import Iterable

from huggingface_hub.errors import StrictDataclassError

# What model and configuration classes raise for a configuration they cannot build: any of these, as their code differs.
# The error is never dropped; it becomes the reason why a configuration was rejected.
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
    """Base class of the errors of transplant_hf."""


class ConfigurationError(TransplantError):
    """A configuration that cannot be applied: a position out of range, an unknown field, a newer format."""


class CompatibilityError(TransplantError):
    """Donor and recipient do not fit together.

    Args:
        message: The message.
        mismatches: All mismatches, one line each.
    """

    def __init__(self, message: str, mismatches: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.mismatches: tuple[str, ...] = tuple(mismatches)


class CheckpointError(TransplantError):
    """Weights that are malformed, truncated, missing, unsafe or not finite, have other shapes, or cannot be written."""


class IntegrityError(CheckpointError):
    """Bytes on disk differ from the sha256 or size recorded for them."""


class HubError(TransplantError):
    """A repository is missing, gated or private, or the Hub is out of reach; the client's error is the `__cause__`."""


class DataError(TransplantError):
    """Text that cannot be used for training or evaluation."""


class TrainingError(TransplantError):
    """Training that cannot continue; earlier checkpoints are unchanged."""
