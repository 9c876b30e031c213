"""The name and the place of a donor in a transplant: one rule for every call and command.

A name that is given is used. Without one, a donor that is named by its folder or repository is called by the last part
of that, and a `Donor` object, or a donor loaded from its own repository, by the name in its record. (Saving gives a
donor without a name that of its folder, so the two agree unless somebody renames one.) A position that is given is
used. Without one, the donor's recommended position is used, and its recommended mode and strength too. A position alone
means the mode "insert" and strength 1; a warning says so if the donor recommends others. A donor that is spread through
its recipient also gets its recommended mode and strength if exactly its recommended positions are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..config import DonorSpec, TransplantConfig
from ..errors import ConfigurationError
from ..layer_map import Position
from .entry import read_entry

if TYPE_CHECKING:
    from .donor import Donor

logger = logging.get_logger(__name__)


def donor_and_position(donor: Any, position: Position | None) -> tuple[Any, Position | None]:
    """Return a donor and its position, which may be given together as `{donor: position}`."""
    if not isinstance(donor, Mapping):
        return donor, position
    if len(donor) != 1 or position is not None:
        raise ConfigurationError(f"expected one donor, as donor and position or as {{donor: position}}, got {donor}.")
    [(donor, position)] = donor.items()
    return donor, position


def recommended_in(folder: Path) -> dict[str, Any]:
    """Return the position, mode and strength that the `config.json` of a donor's folder recommends; empty if none."""
    fields = read_entry(folder)
    own = [spec for spec in TransplantConfig(**fields).donors if spec.donor == "."] if fields else []
    return recommendation(own[0]) if len(own) == 1 else {}


def recommendation(place: DonorSpec | None) -> dict[str, Any]:
    """Return the arguments of `Donor` that recommend this place."""
    return {} if place is None else {name: getattr(place, name) for name in ("position", "mode", "strength")}


def spec_of(donor: Donor, position: Position | None = None, **given: Any) -> DonorSpec:
    """Return the spec of a donor; everything that is not given is what the donor recommends."""
    source = donor.source
    spec = DonorSpec(
        str(source.reference if source else donor.name or "."),
        position,  # type: ignore[arg-type]
        **{"name": donor.name, **{name: value for name, value in given.items() if value is not None}},
        revision=source.revision if source else None,
        subfolder=source.subfolder if source else None,
    )
    return placed(spec, donor)


def placed(spec: DonorSpec, donor: Donor) -> DonorSpec:
    """Return the spec with the donor's recommended position, mode and strength if it has no position."""
    if spec.position is not None:
        if not isinstance(spec.position, tuple) or spec.position != donor.position:
            _warn_of_recommendation(spec, donor)
            return spec
        return spec.replaced(**{name: vars(donor)[name] for name in _unsaid(spec)})
    if donor.position is None:
        raise ConfigurationError(
            f"donor {donor} recommends no position. Pass one: position=0..L, {{donor: position}} or "
            "DonorSpec(donor, position), on the command line DONOR@POSITION."
        )
    strength = donor.strength if spec.strength is None else spec.strength
    return spec.replaced(position=donor.position, mode=spec.mode or donor.mode, strength=strength)


def _warn_of_recommendation(spec: DonorSpec, donor: Donor) -> None:
    """Say that the donor recommends another mode or strength than a position alone means."""
    others = [name for name in _unsaid(spec) if vars(spec)[name] != vars(donor)[name]]
    if others:
        here, there = (", ".join(f"{name} {vars(one)[name]}" for name in others) for one in (spec, donor))
        logger.warning(
            f"donor {spec.name!r} recommends {there}, and runs with {here}: a position alone means this. Leave out the "
            "position to get what it recommends (on the command line DONOR instead of DONOR@POSITION), or in Python "
            f"pass {' and '.join(f'{name}=' for name in others)} in a DonorSpec."
        )


def _unsaid(spec: DonorSpec) -> list[str]:
    return [name for name in ("mode", "strength") if name in spec.defaults]


def named(donors: Sequence[tuple[DonorSpec, Donor]], asked: str) -> list[tuple[DonorSpec, Donor]]:
    """Name the donors in the repository itself (".") that have no name: as recorded, else after the repository."""
    return [
        (
            spec
            if "name" not in spec.defaults or spec.donor != "."
            else spec.replaced(name=donor.name or Path(asked).name),
            donor,
        )
        for spec, donor in donors
    ]
