"""What a `from_pretrained` call asks for, and the parts that it needs: every name found, every revision pinned.

An adapter of PEFT that lies beside a configuration is loaded with the model, as in Transformers. One beside the
recipient was trained on the recipient's layers, so it is loaded while every donor is switched off. One beside a donor
or a thin transplant was trained on all layers that run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = "merge it into the weights (PEFT's merge_and_unload, then save_pretrained)"


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """What a `from_pretrained` call asks for."""

    asked: str
    source: Source  # where its configuration was found
    config: TransplantConfig  # as it was asked for
    names_transplant: bool  # whether `asked` is a transplant or donor, not a recipient
    open_donors: Mapping[int, Donor] = dataclasses.field(default_factory=dict)  # passed as objects, by their place
    # Where an adapter lies that was trained on the transplant or, if `asked` is not one, on the recipient.
    adapter: Source | None = None


@dataclasses.dataclass(frozen=True)
class TransplantParts:
    """The opened parts of a transplant, every revision pinned; no weight is read yet."""

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
    files = (*([str(gguf_file)] if gguf_only else []), "config.json", "generation_config.json", *_ADAPTER_FILES)
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
        base = _base_of_adapter(source) if adapter is None else None
        if base is None:
            raise ConfigurationError(
                f"{source} is neither a model nor a transplant: there is no config.json in {source.folder}."
            )
        more: dict[str, Any] = {"composition": composition, "overrides": overrides, "adapter": source}
        return read_request(base[0], donors=donors, revision=base[1], hub=hub, **more)
    fields = {} if config is not None or not path.exists() else read_json(path, "config.json")
    if config is None and fields.get("model_type") == TransplantConfig.model_type:
        config = TransplantConfig(**{**fields, "name_or_path": asked})
    names_transplant, open_donors = config is not None, dict[int, Donor]()
    if config is None:
        if not donors:
            raise ConfigurationError(
                f"{source} is a model of type {fields.get('model_type')!r}, not a transplant: say which donors go "
                "into it, donors={'user/donor': position} (--donor DONOR@POSITION)."
            )
        specs, open_donors = _specs(donors)
        config = TransplantConfig(recipient=asked, recipient_revision=source.revision, donors=specs)
    elif donors:
        raise ConfigurationError(
            f"{source} is a transplant already (recipient {config.recipient}). Name its recipient instead, with all "
            "donors together: positions are in the untouched recipient's numbering."
        )
    elif not config.recipient or not config.donors:
        missing = "donors" if config.recipient else "recipient"
        raise ConfigurationError(f"the transplant configuration of {source} names no {missing}.")
    elif adapter is None and (source.folder / ADAPTER_CONFIG).exists():
        adapter = source
    changes: dict[str, Any] = {"recipient_overrides": {**config.recipient_overrides, **overrides}}
    if gguf_file is not None:
        changes["recipient_quantization"] = gguf_quantization(gguf_file)
    if composition is not None:
        changes["composition"] = check_composition(composition, asked)
    return LoadRequest(asked, source, config.replaced(**changes), names_transplant, open_donors, adapter)


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
    base, opened = request.source if request.names_transplant else None, []
    for number, spec in enumerate(request.config.donors):
        if number in request.open_donors:
            opened.append((spec, own_tensors(request.open_donors[number])))
        else:
            where: dict[str, Any] = {"revision": spec.revision, "subfolder": spec.subfolder, "relative_to": base}
            donor = Donor.open(locate(spec.donor, files=DONOR_FILES, hub=hub, **where))
            opened.append((placed(spec, donor), donor))
    donors = [(_pinned(spec, donor), donor) for spec, donor in named(opened, request.asked)]
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


# -- Adapters ----------------------------------------------------------------------------------------------------------


def _base_of_adapter(source: Source) -> tuple[str, str | None] | None:
    """Return the model that an adapter was trained on, and its revision; `None` where there is no adapter."""
    if not (source.folder / ADAPTER_CONFIG).exists():
        return None
    fields = read_json(source.folder / ADAPTER_CONFIG, ADAPTER_CONFIG)
    base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(base, str) or not base:
        raise ConfigurationError(
            f"{source} holds an adapter and no model, and its {ADAPTER_CONFIG} names no base_model_name_or_path. Name "
            "the recipient itself."
        )
    return base, revision if isinstance(revision, str) else None


def find_adapter(request: LoadRequest, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the arguments with which `load_adapter` puts an adapter on the transplant, and the other arguments."""
    options = dict(kwargs.get("adapter_kwargs") or {})
    others = {name: value for name, value in kwargs.items() if name != "adapter_kwargs"}
    if not request.names_transplant:
        if request.adapter is not None:
            options["_adapter_model_path"] = str(request.adapter.folder)
        return None, {**others, **({"adapter_kwargs": options} if options else {})}
    # If an Auto class was asked for an adapter, it is here, and the transplant is its base model.
    where = os.fspath(options.pop("_adapter_model_path", request.asked))
    if where == request.asked:
        if request.adapter is None:
            return None, others
        where, options = str(request.adapter.folder), {}
    return {"peft_model_id": where, "adapter_name": kwargs.get("adapter_name"), "adapter_kwargs": options}, others


def load_adapter_beside(model: Any, adapter: Mapping[str, Any], recipient: str) -> None:
    """Load an adapter that was trained on a transplant."""
    where = adapter["peft_model_id"]
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(
            f"{where} holds an adapter ({ADAPTER_CONFIG}), which needs PEFT: pip install peft. To load the transplant "
            "without it, move that file away."
        )
    if model._hf_peft_config_loaded:
        raise ConfigurationError(
            f"{where} holds an adapter of the transplant, and its recipient {recipient} has one of its own layers; "
            f"they cannot be loaded together. For the recipient's, {_MERGE}, or move one {ADAPTER_CONFIG} away."
        )
    model.load_adapter(**adapter)


def refuse_replaced(model: Any, where: Any) -> None:
    """Refuse an adapter of the recipient where some of the recipient's layers were not loaded."""
    blueprint = model._transplant.blueprint
    names = [part.name for part in blueprint.parts if part.spec.mode == "replace"]
    if names and not blueprint.keep_replaced:
        raise ConfigurationError(
            f"{where} holds an adapter of the recipient's layers ({ADAPTER_CONFIG}), of which donor {names[0]!r} "
            f"replaces some. Load with keep_replaced=True; or {_MERGE}, or move that file away."
        )
