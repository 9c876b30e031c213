"""Donors and transplants, by their configuration and the headers of the donors' weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture.build import BUILD_ERRORS
from ..compatibility import CompatibilityReport
from ..config import DonorSpec, TransplantConfig
from ..donor import Donor, DonorRecord
from ..donor.place import named, placed
from ..donor.tensors import DONOR_FILE, DONOR_INDEX, layer_of
from ..errors import ConfigurationError, TransplantError
from ..layer_map import LayerMap, Placement, Splice
from ..model.check import check_compatibility
from ..sources import HubOptions, Source, points_to_folder
from .files import Files
from .findings import DonorInspection, PlacedDonor, TransplantInspection, Weights
from .headers import HeaderTensors
from .recipients import look_at
from .weights import read_weights, summary

__all__ = ["Asked", "carries_recipient", "inspect_donor", "inspect_transplant", "read_transplant"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the caller wants to know.

    Args:
        what: What is inspected.
        recipient: A recipient to hold it against.
        position: Where it would go.
        verify: Whether files are hashed.
        hub: How to reach the Hub.
    """

    what: str
    recipient: str | None
    position: int | None
    verify: bool
    hub: HubOptions


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A donor by its headers, its weights summed up, and what is wrong with them."""

    donor: Donor
    weights: Weights
    problems: tuple[str, ...]


def inspect_donor(files: Files, fields: Mapping[str, Any], asked: Asked) -> DonorInspection:
    """Inspect a donor.

    Args:
        files: Its files.
        fields: Its `config.json`; empty when there is none.
        asked: What is wanted.

    Raises:
        TransplantError: Malformed, or out of reach.
    """
    config = read_transplant(fields, files.source) if fields.get("model_type") == TransplantConfig.model_type else None
    spec = next((spec for spec in config.donors if spec.donor == "."), None) if config is not None else None
    opened = _open(files, asked.verify)
    donor, record = opened.donor, opened.donor.record
    named = config.recipient if config is not None and config.recipient else None
    recipient = named or record.source_id
    revision = config.recipient_revision if config is not None and named else record.source_revision
    place = donor.position if asked.position is None else asked.position
    overrides = config.recipient_overrides if config is not None else {}
    notes: list[str] = []
    problems = list(opened.problems)
    report, layer_map = None, LayerMap()
    name = str(spec.name) if spec is not None and spec.is_named else donor.name or Path(asked.what).name or "donor"
    if asked.recipient is not None:
        report = _fit(asked.recipient, donor, place, donor.mode, asked.hub)
        layer_map = report.layer_map
        problems += [] if report else [str(report)]
    elif place is not None and recipient is not None:
        # A reference in `config.json` is relative to it; one in the record is not, but means the Hub where it is there.
        base = files.source if named or files.source.from_hub else None
        placement = Placement(name, place, record.layer_indices, donor.mode == "replace")
        layer_map, notes = _map_of(recipient, revision, base, [placement], asked.hub, overrides)
    else:
        known = {"recipient": recipient, "position": place}
        missing = " and ".join(f"no {name}" for name, value in known.items() if value is None)
        notes.append(f"{missing} is recorded, so there is no layer map.")
    return DonorInspection(
        what=asked.what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        name=donor.name,
        model_type=donor.model_type,
        layer_indices=record.layer_indices,
        source=record.source_id,
        source_revision=record.source_revision,
        recipient=recipient,
        recipient_revision=revision,
        position=donor.position,
        mode=donor.mode,
        strength=donor.strength,
        placed_at=place,
        metadata=donor.metadata,
        weights=opened.weights,
        layer_map=layer_map,
        compatibility=report,
    )


def inspect_transplant(files: Files, fields: Mapping[str, Any], asked: Asked) -> TransplantInspection:
    """Inspect a transplant.

    Args:
        files: Its files.
        fields: Its `config.json`.
        asked: What is wanted.

    Raises:
        TransplantError: Malformed, or a donor out of reach.
    """
    config = read_transplant(fields, files.source)
    if not config.recipient or not config.donors:
        missing = "donors" if config.recipient else "recipient"
        raise ConfigurationError(f"the transplant configuration of {files.source} names no {missing}.")
    if asked.position is not None and len(config.donors) > 1:
        raise ConfigurationError(
            f"{files.source} holds {len(config.donors)} donors, each at its own position; a position can be asked for "
            "where there is one."
        )
    donors: list[PlacedDonor] = []
    problems: list[str] = []
    reports = []
    found = []
    for written in config.donors:
        spec = written if asked.position is None else written.replaced(position=asked.position)
        part = Files.find(
            spec.donor, asked.hub, revision=spec.revision, subfolder=spec.subfolder, relative_to=files.source
        )
        opened = _open(part, asked.verify)
        chosen = opened.donor if spec.layers is None else opened.donor.part(spec.layers)
        found.append((placed(spec, chosen), chosen, opened, part.source))
    specs = [spec for spec, _ in named([(spec, chosen) for spec, chosen, *_ in found], asked.what)]
    for spec, (_, chosen, opened, source) in zip(specs, found, strict=True):
        problems += [f"donor {spec.name}: {problem}" for problem in opened.problems]
        donors.append(_placed(spec, chosen, opened.weights, source))
        if asked.recipient is not None:
            report = _fit(asked.recipient, chosen, spec.position, spec.mode, asked.hub)
            reports.append(report)
            problems += [] if report else [str(report)]
    placements = [Placement(d.name, d.position, d.layer_indices, d.mode == "replace") for d in donors]
    recipient, revision, base = config.recipient, config.recipient_revision, files.source
    if asked.recipient is None:
        layer_map, notes = _map_of(recipient, revision, base, placements, asked.hub, config.recipient_overrides)
    elif problems:
        layer_map, notes = LayerMap(), []
    else:
        layer_map, notes = _map_of(asked.recipient, None, None, placements, asked.hub)
    # One donor may run in two places.
    once = {(donor.donor, donor.revision, donor.subfolder): donor.weights for donor in donors}
    return TransplantInspection(
        what=asked.what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        recipient=recipient,
        recipient_revision=revision,
        full=carries_recipient(config, files.source),
        donors=tuple(donors),
        composition=config.composition,
        parameters=sum(weights.parameters for weights in once.values()),
        size=sum(weights.size for weights in once.values()),
        layer_map=layer_map,
        compatibility=tuple(reports),
    )


def read_transplant(fields: Mapping[str, Any], source: Source) -> TransplantConfig:
    """Read the `config.json` of a transplant.

    Raises:
        ConfigurationError: Fields of the wrong kind.
    """
    try:
        return TransplantConfig(**{**fields, "name_or_path": str(source)})
    except BUILD_ERRORS as error:
        raise ConfigurationError(f"the config.json of {source} is no transplant's: {error}") from error


def carries_recipient(config: TransplantConfig, source: Source) -> bool:
    """Whether a transplant's recipient is a folder inside it."""
    folder = points_to_folder(config.recipient, source, config.recipient_revision)
    return folder is not None and folder.resolve().is_relative_to(source.folder.resolve())


def _fit(recipient: str, donor: Donor, position: int | None, mode: str, hub: HubOptions) -> CompatibilityReport:
    try:
        return check_compatibility(recipient, donor, position, mode, trust_remote_code=False, **hub.as_kwargs())
    except ValueError as error:  # Transformers' refusal to run code from the repository
        raise ConfigurationError(f"recipient {recipient} cannot be looked at: {error}") from error


def _map_of(
    recipient: str,
    revision: str | None,
    base: Source | None,
    placements: list[Placement],
    hub: HubOptions,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[LayerMap, list[str]]:
    """Draw the layer map, or say why there is none: a recipient may be out of reach of who has the donor.

    Args:
        recipient: The recipient.
        revision: Its revision.
        base: What holds the `config.json` in which the reference stands.
        placements: The donors in their places.
        hub: How to reach the Hub.
        overrides: What the transplant sets in the recipient's configuration.

    Raises:
        ConfigurationError: A position the recipient does not have.
    """
    try:
        layers = look_at(recipient, revision, base, hub, overrides).anatomy.num_layers
    except TransplantError as error:
        return LayerMap(), [f"no layer map: {error}"]
    changed = ", ".join(sorted(overrides or ()))
    notes = [f"it sets these fields of the recipient's configuration: {changed}."] if changed else []
    return Splice(layers, placements).layer_map(), notes


def _open(files: Files, verify: bool) -> _Opened:
    record = DonorRecord.read(files.folder)
    name = DONOR_INDEX if files.has(DONOR_INDEX) else DONOR_FILE
    headers = read_weights(files, name, DONOR_INDEX)
    tensors = headers.flat()
    tensors_there = HeaderTensors(tensors, str(files.source))
    donor = Donor.open(files.source, tensors_there)
    weights, problems = summary(files, headers, record.files, verify)
    unlisted = record.without_sha256(headers.files, files.source.from_hub)
    if unlisted:
        problems.append(f"{', '.join(unlisted)}: no sha256 is recorded, so that its bytes cannot be checked on loading")
    per_layer = [0] * donor.num_layers
    for tensor, header in tensors.items():
        per_layer[layer_of(tensor)[0]] += header.num_elements
    return _Opened(donor, dataclasses.replace(weights, per_layer=tuple(per_layer)), tuple(problems))


def _placed(spec: DonorSpec, donor: Donor, weights: Weights, source: Source) -> PlacedDonor:
    return PlacedDonor(
        name=str(spec.name),
        donor=source.reference,
        revision=source.revision,
        subfolder=source.subfolder,
        position=spec.position,
        mode=spec.mode,
        strength=spec.strength,
        layer_indices=donor.record.layer_indices,
        metadata=donor.metadata,
        weights=weights,
    )
