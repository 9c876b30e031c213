"""The result of `check`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import CompatibilityError
from ..layer_map import LayerMap

__all__ = ["CompatibilityReport"]


@dataclasses.dataclass(frozen=True)
class CompatibilityReport:
    """Whether a donor fits a recipient at a position, and why not.

    Args:
        recipient: The recipient, with its commit if it has one.
        donor: The donor, with its commit if it has one.
        position: The position.
        mismatches: Every mismatch, both values in each line; empty when it fits.
        native: Whether the recipient's own class can be configured for these layers; `None` when it does not fit.
        notes: If only transplant_hf can load the result, the reasons.
        layer_map: The layers that would run.
    """

    recipient: str
    donor: str
    position: int
    mismatches: tuple[str, ...] = ()
    native: bool | None = None
    notes: tuple[str, ...] = ()
    layer_map: LayerMap = dataclasses.field(default_factory=LayerMap)

    @property
    def compatible(self) -> bool:
        """Whether it fits."""
        return not self.mismatches

    def __bool__(self) -> bool:
        return self.compatible

    def __str__(self) -> str:
        head = f"donor {self.donor} {{}} recipient {self.recipient} at position {self.position}"
        if self.mismatches:
            return "\n".join([f"{head.format('does not fit')}:", *(f"  - {line}" for line in self.mismatches)])
        kind = "as a native model" if self.native else "with layers only transplant_hf can load"
        return "\n".join([f"{head.format('fits')}, {kind}.", *(f"  - {line}" for line in self.notes)])

    def raise_for_mismatches(self) -> None:
        """Raise when it does not fit.

        Raises:
            CompatibilityError: With every mismatch.
        """
        if self.mismatches:
            raise CompatibilityError(
                f"{self}\nA donor needs a recipient with layers of the same shape.", self.mismatches
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {**dataclasses.asdict(self), "layer_map": list(self.layer_map), "compatible": self.compatible}
