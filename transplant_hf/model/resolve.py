"""From what was asked for to what is loaded: configurations and donors found, every revision pinned."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Recipient, open_recipient
from ..config import DonorSpec, TransplantConfig, donor_specs
from ..donor import DONOR_FILES, Donor
from ..donor.place import named, placed, spec_of
from ..errors import ConfigurationError
from ..sources import HubOptions, Source, locate, revision_for
from ..storage import read_json
from .adapters import ADAPTER_CONFIG, ADAPTER_FILES, base_of_adapter
from .live import own_tensors

__all__ = ["Request", "open_donors", "read_request", "recipient_config"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a `from_pretrained` call asked for.

    Args:
        asked: The repo or folder that was named.
        source: Where its configuration was found.
        config: The transplant to load.
        names_transplant: Whether `asked` is a transplant or donor, not a recipient.
        opened: The donors that were given as such and not by their names, by their place in the list.
    """

    asked: str
    source: Source
    config: TransplantConfig
    names_transplant: bool
    opened: Mapping[int, Donor] = dataclasses.field(default_factory=dict)
    adapter: Source | None = None


def read_request(
    asked: str | os.PathLike[str],
    *,
    donors: Any,
    config: TransplantConfig | None,
    revision: str | None,
    subfolder: str | None,
    hub: HubOptions,
    gguf_file: str | None = None,
    adapter: Source | None = None,
) -> Request:
    """Find out what a repo or folder is, and what transplant it stands for.

    Args:
        asked: Hub id or folder.
        donors: Donors named in the call, or `None`: what `donor_specs` takes, or opened ones instead of their names.
        config: A configuration given in the call.
        revision: The revision asked for.
        subfolder: The folder inside it.
        hub: How to reach the Hub.
        gguf_file: The file that a recipient is read from, which may be all there is of it.
        adapter: The adapter whose base model this is, where an adapter was asked for.

    Raises:
        ConfigurationError: A recipient without donors, a transplant with further ones, or neither.
        HubError: Out of reach.
    """
    asked = os.fspath(asked)
    alone = bool(gguf_file and donors)
    files = (*([gguf_file] if gguf_file and donors else []), "config.json", "generation_config.json", *ADAPTER_FILES)
    revision = revision_for(asked, revision)
    changed: dict[str, Any] = {}
    source = locate(asked, files=files, revision=revision, subfolder=subfolder, hub=hub)
    if config is not None and source.from_hub and config.name_or_path == asked and os.path.isdir(asked):
        # The Auto classes read it in a folder of that name, whatever the revision: only what was set since counts.
        there = TransplantConfig(**read_json(Path(asked) / "config.json", "config.json")).recipient_overrides
        changed = {name: value for name, value in config.recipient_overrides.items() if there.get(name) != value}
        config = None
    path = source.folder / "config.json"
    base = base_of_adapter(source) if config is None and adapter is None and not path.exists() and not alone else None
    if base is not None:
        return read_request(
            base[0], donors=donors, config=None, revision=base[1], subfolder=None, hub=hub, adapter=source
        )
    if config is None and not path.exists() and not alone:
        raise ConfigurationError(
            f"{source} is neither a model nor a transplant: there is no config.json in {source.folder}."
        )
    fields = {} if config is not None or not path.exists() else read_json(path, "config.json")
    if config is None and fields.get("model_type") == TransplantConfig.model_type:
        config = TransplantConfig(**{**fields, "name_or_path": asked})
        config.recipient_overrides |= changed
    if config is None:
        if not donors:
            raise ConfigurationError(
                f"{source} is a model of type {fields.get('model_type')!r}, not a transplant: say which donors go "
                "into it, donors={'user/donor': position}."
            )
        specs, opened = _specs(donors)
        own = TransplantConfig(recipient=asked, recipient_revision=source.revision, donors=specs)
        return Request(asked, source, own, names_transplant=False, opened=opened, adapter=adapter)
    if donors:
        raise ConfigurationError(
            f"{source} is a transplant already (recipient {config.recipient}). Name its recipient instead, with all "
            "donors together: positions are in the untouched recipient's numbering."
        )
    if not config.recipient or not config.donors:
        missing = "a recipient" if not config.recipient else "donors"
        raise ConfigurationError(f"the transplant configuration of {source} names no {missing.removeprefix('a ')}.")
    if adapter is None and (source.folder / ADAPTER_CONFIG).exists():
        adapter = source
    return Request(asked, source, copy.deepcopy(config), names_transplant=True, adapter=adapter)


def _specs(donors: Any) -> tuple[list[DonorSpec], dict[int, Donor]]:
    """Return the specs of the donors named in a call, and those that are opened already by their place among them."""
    if isinstance(donors, Donor):
        donors = [donors]
    if isinstance(donors, Mapping) and any(isinstance(one, Donor) for one in donors):
        donors = [(one, position) for one, position in donors.items()]
    elif isinstance(donors, list | tuple):
        donors = [(one, None) for one in donors]
    else:
        return donor_specs(donors), {}
    opened = {number: one for number, (one, _) in enumerate(donors) if isinstance(one, Donor)}
    specs = [
        spec_of(one, position) if isinstance(one, Donor) else one if position is None else DonorSpec(one, position)
        for one, position in donors
    ]
    return donor_specs(specs), opened


def open_donors(request: Request, hub: HubOptions) -> list[tuple[DonorSpec, Donor]]:
    """Open every donor of a request by its headers, and pin its revision in the request's configuration.

    Raises:
        HubError: Out of reach.
        CheckpointError: No donor, or malformed.
    """
    base = request.source if request.names_transplant else None
    opened = []
    for number, spec in enumerate(request.config.donors):
        if (given := request.opened.get(number)) is not None:
            opened.append((spec, own_tensors(given)))
            continue
        source = locate(
            spec.donor, files=DONOR_FILES, revision=spec.revision, subfolder=spec.subfolder, relative_to=base, hub=hub
        )
        donor = Donor.open(source)
        opened.append((placed(spec, donor), donor))
    opened = [(_pinned(spec, donor), donor) for spec, donor in named(opened, request.asked)]
    request.config.donors = donor_specs([spec for spec, _ in opened])
    return opened


def _pinned(spec: DonorSpec, donor: Donor) -> DonorSpec:
    source = donor.source
    if source is None:
        return spec
    reference = source.reference if source.from_hub else str(_whole(source))
    return dataclasses.replace(spec, donor=reference, revision=source.revision, subfolder=source.subfolder)


def _whole(source: Source) -> Path:
    folder = source.folder.resolve()
    return folder if not source.subfolder else folder.parents[len(Path(source.subfolder).parts) - 1]


def recipient_config(
    request: Request, hub: HubOptions, trust_remote_code: bool | None, kwargs: dict[str, Any]
) -> Recipient:
    """Open the recipient and pin its revision in the request's configuration."""
    config = request.config
    recipient = open_recipient(
        config.recipient,
        config.recipient_revision,
        hub,
        relative_to=request.source if request.names_transplant else None,
        with_weights=True,
        gguf_file=kwargs.get("gguf_file"),
        overrides=config.recipient_overrides,
        trust_remote_code=trust_remote_code,
        kwargs=kwargs,
    )
    config.recipient, config.recipient_revision = recipient.reference, recipient.revision
    return recipient
