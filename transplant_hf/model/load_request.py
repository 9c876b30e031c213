"""What a `from_pretrained` call asks for, and the parts that it needs: every name found, every revision pinned."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import Recipient, check_gguf_reader, open_recipient
from ..config import DonorSpec, TransplantConfig, check_composition, donor_specs, gguf_file_of, gguf_quantization
from ..donor import DONOR_FILES, Donor
from ..donor.place import named, placed, spec_of
from ..errors import ConfigurationError
from ..sources import HubOptions, Source, locate, revision_for
from ..splice import Blueprint, draw_blueprint
from ..storage import read_json
from .live import own_tensors
from .load_adapters import ADAPTER_CONFIG, ADAPTER_FILES, base_of_adapter


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """What a `from_pretrained` call asks for.

    Args:
        asked: The repo or folder that the call names.
        source: Where its configuration was found.
        config: The transplant to load, as it was asked for.
        names_transplant: Whether `asked` is a transplant or donor, not a recipient.
        open_donors: The donors that were passed as objects, by their place in the list.
        adapter: Where an adapter lies that was trained on the transplant or, if `asked` is not one, on the recipient.
    """

    asked: str
    source: Source
    config: TransplantConfig
    names_transplant: bool
    open_donors: Mapping[int, Donor] = dataclasses.field(default_factory=dict)
    adapter: Source | None = None


@dataclasses.dataclass(frozen=True)
class TransplantParts:
    """The opened parts of a transplant; no weight is read yet.

    Args:
        config: The transplant's configuration, every revision pinned.
        donors: The donors and their places.
        recipient: The recipient.
    """

    config: TransplantConfig
    donors: Sequence[tuple[DonorSpec, Donor]]
    recipient: Recipient

    def blueprint(self, auto_class: Any, keep_replaced: bool = False) -> Blueprint:
        """Plan what runs, under the head of an Auto class."""
        return draw_blueprint(*self.recipient.model_class(auto_class), self.donors, self.config, keep_replaced)


def read_request(
    asked: str | os.PathLike[str],
    *,
    donors: Any = None,
    config: TransplantConfig | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    hub: HubOptions,
    gguf_file: str | None = None,
    composition: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    adapter: Source | None = None,
) -> LoadRequest:
    """Find out what a repo or folder is, and which transplant it describes."""
    asked = os.fspath(asked)
    gguf_only = bool(gguf_file and donors)
    files = (*([str(gguf_file)] if gguf_only else []), "config.json", "generation_config.json", *ADAPTER_FILES)
    revision = revision_for(asked, revision)
    source = locate(asked, files=files, revision=revision, subfolder=subfolder, hub=hub)
    path = source.folder / "config.json"
    overrides = dict(overrides or {})
    if config is not None and source.from_hub and config.name_or_path == asked and os.path.isdir(asked):
        # The Auto classes read the folder of that name, whatever the revision: only what was set since counts.
        there = TransplantConfig(**read_json(Path(asked) / "config.json", "config.json")).recipient_overrides
        changed = {name: value for name, value in config.recipient_overrides.items() if there.get(name) != value}
        config, overrides = None, {**changed, **overrides}
    if config is None and not path.exists() and not gguf_only:
        base = base_of_adapter(source) if adapter is None else None
        if base is None:
            raise ConfigurationError(
                f"{source} is neither a model nor a transplant: there is no config.json in {source.folder}."
            )
        more: dict[str, Any] = {"composition": composition, "overrides": overrides, "adapter": source}
        return read_request(base[0], donors=donors, revision=base[1], hub=hub, **more)
    fields = {} if config is not None or not path.exists() else read_json(path, "config.json")
    if config is None and fields.get("model_type") == TransplantConfig.model_type:
        config = TransplantConfig(**{**fields, "name_or_path": asked})
    if config is None:
        if not donors:
            raise ConfigurationError(
                f"{source} is a model of type {fields.get('model_type')!r}, not a transplant: say which donors go "
                "into it, donors={'user/donor': position} (--donor DONOR@POSITION)."
            )
        specs, open_donors = _specs(donors)
        own = TransplantConfig(recipient=asked, recipient_revision=source.revision, donors=specs)
        own = _changed(own, asked, composition, overrides, gguf_file)
        return LoadRequest(asked, source, own, False, open_donors, adapter)
    if donors:
        raise ConfigurationError(
            f"{source} is a transplant already (recipient {config.recipient}). Name its recipient instead, with all "
            "donors together: positions are in the untouched recipient's numbering."
        )
    if not config.recipient or not config.donors:
        missing = "donors" if config.recipient else "recipient"
        raise ConfigurationError(f"the transplant configuration of {source} names no {missing}.")
    if adapter is None and (source.folder / ADAPTER_CONFIG).exists():
        adapter = source
    return LoadRequest(asked, source, _changed(config, asked, composition, overrides, gguf_file), True, {}, adapter)


def _changed(
    config: TransplantConfig, asked: str, composition: str | None, overrides: Mapping[str, Any], gguf_file: str | None
) -> TransplantConfig:
    changes: dict[str, Any] = {"recipient_overrides": {**config.recipient_overrides, **overrides}}
    if gguf_file is not None:
        changes["recipient_quantization"] = gguf_quantization(gguf_file)
    if composition is not None:
        changes["composition"] = check_composition(composition, asked)
    return config.replaced(**changes)


def _specs(donors: Any) -> tuple[list[DonorSpec], dict[int, Donor]]:
    """Return the specs of the donors that a call names, and the `Donor` objects by their place among them."""
    if isinstance(donors, Donor):
        donors = [donors]
    if isinstance(donors, Mapping) and any(isinstance(one, Donor) for one in donors):
        donors = [(one, position) for one, position in donors.items()]
    elif isinstance(donors, list | tuple):
        donors = [(one, None) for one in donors]
    else:
        return donor_specs(donors), {}
    open_donors = {number: one for number, (one, _) in enumerate(donors) if isinstance(one, Donor)}
    specs = [
        spec_of(one, position) if isinstance(one, Donor) else one if position is None else DonorSpec(one, position)
        for one, position in donors
    ]
    return donor_specs(specs), open_donors


def find_parts(
    request: LoadRequest,
    hub: HubOptions,
    trust_remote_code: bool | None = False,
    kwargs: Mapping[str, Any] | None = None,
    recipient: Recipient | None = None,
) -> TransplantParts:
    """Open the donors of a request and its recipient, unless another is to be used, by configurations and headers."""
    donors = _open_donors(request, hub)
    recipient = recipient or recipient_of(request, hub, trust_remote_code, kwargs)
    config = request.config.replaced(
        donors=donor_specs([spec for spec, _ in donors]),
        recipient=recipient.reference,
        recipient_revision=recipient.revision,
        # Where the files of a tokenizer lie that belongs to the transplant.
        name_or_path=str(request.source.folder) if request.names_transplant else "",
    )
    return TransplantParts(config, donors, recipient)


def recipient_of(
    request: LoadRequest,
    hub: HubOptions,
    trust_remote_code: bool | None = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Recipient:
    """Open the recipient of a request; see `find_parts`."""
    gguf_file = gguf_file_of(request.config)
    check_gguf_reader(gguf_file)
    return open_recipient(
        request.config.recipient,
        request.config.recipient_revision,
        hub,
        relative_to=request.source if request.names_transplant else None,
        with_weights=True,
        gguf_file=gguf_file,
        overrides=request.config.recipient_overrides,
        trust_remote_code=trust_remote_code,
        kwargs=kwargs,
    )


def _open_donors(request: LoadRequest, hub: HubOptions) -> list[tuple[DonorSpec, Donor]]:
    base = request.source if request.names_transplant else None
    donors = []
    for number, spec in enumerate(request.config.donors):
        if number in request.open_donors:
            donors.append((spec, own_tensors(request.open_donors[number])))
            continue
        where: dict[str, Any] = {"revision": spec.revision, "subfolder": spec.subfolder, "relative_to": base}
        donor = Donor.open(locate(spec.donor, files=DONOR_FILES, hub=hub, **where))
        donors.append((placed(spec, donor), donor))
    return [(_pinned(spec, donor), donor) for spec, donor in named(donors, request.asked)]


def _pinned(spec: DonorSpec, donor: Donor) -> DonorSpec:
    """The spec with the donor's absolute folder, or its commit."""
    source = donor.source
    if source is None:
        return spec
    reference = source.reference
    if not source.from_hub:
        folder = source.folder.resolve()
        reference = str(folder.parents[len(Path(source.subfolder).parts) - 1] if source.subfolder else folder)
    return dataclasses.replace(spec, donor=reference, revision=source.revision, subfolder=source.subfolder)
