"""What is planned: a recipient and donors by their headers, or layers of its shape that do not exist yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..architecture import Anatomy
from ..config import DonorSpec, TransplantConfig, donor_specs
from ..donor import DONOR_CONFIG, Donor, DonorRecord
from ..donor.dtypes import stored_dtype
from ..donor.place import named, placed
from ..donor.tensors import DONOR_FILE, DONOR_INDEX
from ..errors import ConfigurationError
from ..inspection.donors import read_transplant
from ..inspection.files import BIN_FILES, MODEL_FILE, MODEL_INDEX, Files
from ..inspection.headers import HeaderTensors, TensorHeader
from ..inspection.recipients import look_at
from ..inspection.weights import read_weights
from ..layer_map import paper_layers
from ..sources import HubOptions, Source
from ..splice import Blueprint, draw_blueprint
from ..storage import read_json
from .numbers import asked_dtype

__all__ = ["Subject", "find_subject"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a plan is about.

    Args:
        recipient: The untouched recipient, looked at in the type of numbers it would be loaded with.
        source: Where it was found.
        blueprint: The transplant; `None` when there is no donor.
        headers: The recipient's tensors by their names in its files; empty when only its configuration is at hand.
        invented: Whether the donor exists on paper only.
        notes: What was assumed.
    """

    recipient: Anatomy
    source: Source
    blueprint: Blueprint | None
    headers: Mapping[str, TensorHeader]
    invented: bool
    notes: tuple[str, ...]


def find_subject(
    what: str,
    donors: Any,
    layers: int | None,
    position: int | None,
    dtype: str,
    revision: str | None,
    hub: HubOptions,
) -> Subject:
    """Find what is to be planned, by configurations and headers alone.

    Args:
        what: Hub id or folder of a recipient, a donor or a transplant.
        donors: `{donor: position}` or a list of `DonorSpec`, when a recipient is named.
        layers: A donor of so many layers, like the recipient's own, instead.
        position: Where that goes; by default where its layers are from.
        dtype: The type of numbers, "auto" or such as "bfloat16".
        revision: Of `what`.
        hub: How to reach the Hub.

    Raises:
        TransplantError: Out of reach, malformed, or what does not fit.
    """
    files = Files.find(what, hub, revision=revision)
    fields = read_json(files.folder / "config.json", "config.json") if files.has("config.json") else {}
    base: Source | None = None
    recipient, at = what, revision
    config = TransplantConfig(recipient=what)
    if fields.get("model_type") == TransplantConfig.model_type:
        config, base = read_transplant(fields, files.source), files.source
        recipient, at = config.recipient, config.recipient_revision
        if donors or layers:
            raise ConfigurationError(
                f"{what} is a transplant already (recipient {recipient}). Name its recipient instead, with all donors "
                "together."
            )
    elif donors:
        config.donors = donor_specs(donors)
    if donors and layers:
        raise ConfigurationError("give either donors, or the number of layers of one that does not exist yet.")
    if position is not None and not layers:
        raise ConfigurationError("position is that of the layers asked for with layers=; a donor brings its own.")

    look = look_at(recipient, at, base, hub, config.recipient_overrides)
    headers, notes = _headers(Files.find(recipient, hub, revision=at, relative_to=base))
    anatomy = dataclasses.replace(look.anatomy, config=asked_dtype(look.anatomy.config, dtype, headers))
    parts = [(spec, _donor(spec, base, hub)) for spec in config.donors]
    parts = named([(placed(spec, donor), donor) for spec, donor in parts], what)
    if layers:
        parts = [_invented(anatomy, layers, position)]
    config.donors = donor_specs([spec for spec, _ in parts])
    blueprint = draw_blueprint(anatomy.model_class, anatomy.config, parts, config) if parts else None
    return Subject(blueprint.recipient if blueprint else anatomy, look.source, blueprint, headers, bool(layers), notes)


def _headers(files: Files) -> tuple[dict[str, TensorHeader], tuple[str, ...]]:
    name = next((name for name in (MODEL_FILE, MODEL_INDEX) if files.has(name)), None)
    if name is not None:
        return read_weights(files, name, MODEL_INDEX).flat(), ()
    pickled = [name for name in BIN_FILES if files.has(name)]
    why = f"its weights are pickled ({pickled[0]}) and have no headers" if pickled else "no weights are at hand"
    return {}, (f"of {files.source} the configuration alone was read, {why}: bytes in its files are assumed.",)


def _donor(spec: DonorSpec, base: Source | None, hub: HubOptions) -> Donor:
    files = Files.find(spec.donor, hub, revision=spec.revision, subfolder=spec.subfolder, relative_to=base)
    if not files.has(DONOR_CONFIG):
        raise ConfigurationError(f"{files.source} is no donor: it has no {DONOR_CONFIG}.")
    headers = read_weights(files, DONOR_INDEX if files.has(DONOR_INDEX) else DONOR_FILE, DONOR_INDEX)
    tensors = HeaderTensors(headers.flat(), str(files.source))
    return Donor.open(files.source, tensors)


def _invented(recipient: Anatomy, count: int, position: int | None) -> tuple[DonorSpec, Donor]:
    """A donor as `extract` would take it out of the recipient, in full precision."""
    chosen = tuple(paper_layers(recipient.num_layers, count))
    tensors = {
        f"layers.{number}.{name}": TensorHeader(
            tuple(tensor.shape), stored_dtype(tensor.dtype, name), tensor.numel() * tensor.element_size()
        )
        for number, index in enumerate(chosen)
        for name, tensor in recipient.layers[index].state_dict().items()
    }
    record = DonorRecord(recipient.config.model_type, recipient.config.to_dict(), chosen)
    spec = DonorSpec("layers-to-come", chosen[0] if position is None else position, name="donor")
    return spec, Donor(record, HeaderTensors(tensors, "a donor that does not exist yet"))
