"""How the commands name a donor and its position: `DONOR`, or `DONOR@POSITION`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..config import DonorSpec

__all__ = ["DONOR", "DONOR_HELP", "donor_spec"]

DONOR = "DONOR[@POSITION]"
DONOR_HELP = "Hub id or folder of a donor, and how many recipient layers run before it (default: what it recommends)"


def donor_spec(text: str, mode: str | None = None) -> DonorSpec:
    """Read `DONOR`, whose position is the recommended one, or `DONOR@POSITION`.

    Args:
        text: The word on the command line.
        mode: "insert" or "replace"; by default "insert" at a position that is given, else what the donor recommends.

    Raises:
        ConfigurationError: The position is no number.

    Example:
        >>> donor_spec("user/law@3").position, donor_spec("user/law").position
        (3, None)
    """
    from ..config import DonorSpec

    donor, at, position = text.rpartition("@")
    if not at or Path(text).is_dir():
        return DonorSpec(text, mode=mode)  # type: ignore[arg-type]
    if not donor or not (position.isascii() and position.isdigit()):
        raise ConfigurationError(
            f"a donor is named by DONOR or DONOR@POSITION, such as user/gpt2-law@10, got {text!r}."
        )
    return DonorSpec(donor, int(position), mode)  # type: ignore[arg-type]
