"""Donors and transplants: their configurations, the headers of their weights, and the layer map they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..architecture import open_recipient
from ..compatibility import CompatibilityReport
from ..config import DonorSpec, TransplantConfig
from ..donor import Donor
from ..donor.place import named, placed
from ..donor.record import without_sha256
from ..donor.tensors import layer_of
from ..errors import BUILD_ERRORS, ConfigurationError, TransplantError
from ..layer_map import LayerMap, Placement, Position, Splice
from ..model.check import check
from ..sources import HubOptions, Source, points_to_folder
from .files import Files, HeaderTensors, summarize_weights
from .findings import DonorInspection, PlacedDonor, TransplantInspection, Weights


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    """The arguments of `inspect`."""

    what: str
    recipient: str | None
    position: Position | None
    verify: bool
    hub: HubOptions


@dataclasses.dataclass(frozen=True)
class OpenedDonor:
    """A donor by its headers, its place, and how its files differ from what is recorded of them."""

    spec: DonorSpec
    donor: Donor
    source: Source
    weights: Weights
    problems: Sequence[str]

    @property
    def chosen(self) -> Donor:
        """The layers of the donor that run."""
        return self.donor if self.spec.layers is None else self.donor.part(self.spec.layers)

    def described(self) -> PlacedDonor:
        """Return what `inspect` says about it."""
        return PlacedDonor(
            name=str(self.spec.name),
            donor=self.source.reference,
            revision=self.source.revision,
            subfolder=self.source.subfolder,
            position=self.spec.position,
            mode=self.spec.mode,
            strength=self.spec.strength,
            layer_indices=self.chosen.record.layer_indices,
            metadata=self.donor.metadata,
            weights=self.weights,
        )


def open_donors(
    config: TransplantConfig,
    base: Source | None,
    what: str,
    hub: HubOptions,
    position: Position | None = None,
    verify: bool = False,
) -> list[OpenedDonor]:
    """Open the donors of a transplant by their headers, each with its name and its position."""
    opened = []
    for spec in config.donors:
        places = {"revision": spec.revision, "subfolder": spec.subfolder, "relative_to": base}
        files = Files.find(spec.donor, hub, **places)
        donor, weights, problems = _open_donor(files, verify)
        spec = spec if position is None else spec.replaced(position=position)
        [(spec, _)] = named([(placed(spec, donor), donor)], what)
        opened.append(OpenedDonor(spec, donor, files.source, weights, problems))
    return opened


def _open_donor(files: Files, verify: bool) -> tuple[Donor, Weights, list[str]]:
    """Return a donor, the sum of its headers, and how its files differ from what is recorded of them."""
    store = HeaderTensors(files)
    donor = Donor.open(files.source, store)
    per_layer = [0] * donor.num_layers
    for name, tensor in donor.infos().items():
        per_layer[layer_of(name)[0]] += tensor.num_elements
    weights, problems = summarize_weights(files, store.headers, donor.record.files, verify, per_layer)
    unrecorded = without_sha256(donor.record, store.headers, files.source.from_hub)
    if unrecorded:
        problems.append(
            f"{', '.join(unrecorded)}: no sha256 is recorded, so that its bytes cannot be checked on loading"
        )
    return donor, weights, problems


def inspect_donor(files: Files, fields: Mapping[str, Any], arguments: InspectArguments) -> DonorInspection:
    """Inspect a donor."""
    config = TransplantConfig()
    if fields.get("model_type") == TransplantConfig.model_type:
        config = read_transplant_config(fields, files.source)
    donor, weights, problems = _open_donor(files, arguments.verify)
    record = donor.record
    recipient, revision = record.source_id, record.source_revision
    if config.recipient:
        recipient, revision = config.recipient, config.recipient_revision
    position = donor.position if arguments.position is None else arguments.position
    report: CompatibilityReport | None = None
    layer_map = LayerMap()
    notes: list[str] = []
    if arguments.recipient is not None:
        report = check(arguments.recipient, donor, arguments.position, **arguments.hub.as_kwargs())
        layer_map = report.layer_map
        problems += [] if report else [str(report)]
    elif position is not None and recipient is not None:
        # A reference in `config.json` is relative to it. One in the record is not, but a repository's means the Hub.
        base = files.source if config.recipient or files.source.from_hub else None
        own = next((spec for spec in config.donors if spec.donor == "."), DonorSpec("."))
        spec = placed(own.replaced(position=arguments.position, mode=None, strength=None), donor)
        layer_map, notes = _layer_map(
            recipient, revision, base, named([(spec, donor)], arguments.what), arguments.hub, config.recipient_overrides
        )
    else:
        missing = [name for name, value in (("recipient", recipient), ("position", position)) if value is None]
        notes = [f"no {' and no '.join(missing)} is recorded, so there is no layer map."]
    return DonorInspection(
        what=arguments.what,
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
        placed_at=position,
        metadata=donor.metadata,
        weights=weights,
        layer_map=layer_map,
        compatibility=report,
    )


def inspect_transplant(files: Files, fields: Mapping[str, Any], arguments: InspectArguments) -> TransplantInspection:
    """Inspect a transplant."""
    config = read_transplant_config(fields, files.source)
    if not config.recipient or not config.donors:
        missing = "donors" if config.recipient else "recipient"
        raise ConfigurationError(f"the transplant configuration of {files.source} names no {missing}.")
    if arguments.position is not None and len(config.donors) > 1:
        raise ConfigurationError(
            f"{files.source} has {len(config.donors)} donors, each at its own position. A position can be given where "
            "there is one donor."
        )
    parts = open_donors(config, files.source, arguments.what, arguments.hub, arguments.position, arguments.verify)
    problems = [f"donor {part.spec.name}: {problem}" for part in parts for problem in part.problems]
    reports: list[CompatibilityReport] = []
    recipient, revision = config.recipient, config.recipient_revision
    base: Source | None = files.source
    overrides: Mapping[str, Any] = config.recipient_overrides
    if arguments.recipient is not None:
        for part in parts:
            place = part.spec.position, part.spec.mode
            reports.append(check(arguments.recipient, part.chosen, *place, **arguments.hub.as_kwargs()))
        problems += [str(report) for report in reports if not report]
        recipient, revision, base, overrides = arguments.recipient, None, None, {}
    layer_map = LayerMap()
    notes: list[str] = []
    if arguments.recipient is None or not problems:
        donors = [(part.spec, part.chosen) for part in parts]
        layer_map, notes = _layer_map(recipient, revision, base, donors, arguments.hub, overrides)
    found = tuple(part.described() for part in parts)
    # One donor may be at two positions.
    once = {(donor.donor, donor.revision, donor.subfolder): donor.weights for donor in found}
    return TransplantInspection(
        what=arguments.what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        recipient=config.recipient,
        recipient_revision=config.recipient_revision,
        full=has_recipient_inside(config, files.source),
        donors=found,
        composition=config.composition,
        parameters=sum(weights.parameters for weights in once.values()),
        size=sum(weights.size for weights in once.values()),
        layer_map=layer_map,
        compatibility=tuple(reports),
    )


def read_transplant_config(fields: Mapping[str, Any], source: Source) -> TransplantConfig:
    """Read the `config.json` of a transplant."""
    try:
        return TransplantConfig(**{**fields, "name_or_path": str(source)})
    except BUILD_ERRORS as error:
        raise ConfigurationError(f"the config.json of {source} is not valid for a transplant: {error}") from error


def has_recipient_inside(config: TransplantConfig, source: Source) -> bool:
    """Whether the recipient of a transplant is a folder inside it."""
    folder = points_to_folder(config.recipient, source, config.recipient_revision)
    return folder is not None and folder.resolve().is_relative_to(source.folder.resolve())


def _layer_map(
    recipient: str,
    revision: str | None,
    base: Source | None,
    donors: Sequence[tuple[DonorSpec, Donor]],
    hub: HubOptions,
    overrides: Mapping[str, Any],
) -> tuple[LayerMap, list[str]]:
    """Return the layer map and notes; a recipient out of reach gives a note and an empty map."""
    try:
        found = open_recipient(recipient, revision, hub, relative_to=base, overrides=overrides)
        num_layers = found.anatomy().num_layers
    except TransplantError as error:
        return LayerMap(), [f"no layer map: {error}"]
    changed = ", ".join(sorted(overrides))
    notes = [f"it sets these fields of the recipient's configuration: {changed}."] if changed else []
    placements = [Placement.of(spec, donor.record.layer_indices) for spec, donor in donors]
    return Splice(num_layers, placements).layer_map(), notes
