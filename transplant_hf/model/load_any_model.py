"""Load any model by its name: a plain one, a transplant, or a donor in its recipient."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..architecture import check_gguf_reader, forget_gguf, open_recipient
from ..architecture.recipient import Recipient
from ..compatibility import refuse_unsupported
from ..config import TransplantConfig
from ..display import some_of
from ..donor.companions import has_tokenizer, locate_with_companions
from ..errors import CompatibilityError, ConfigurationError
from ..sources import HubOptions, commit_of, for_transformers, locate, points_to_folder, reading, revision_for
from ..splice import Blueprint
from ..storage import read_json
from .load import FOR_MODEL, load_transplant
from .load_weights import HeldBack, from_pretrained
from .surface import transplant_class

# How Transformers spreads a model over what there is.
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_ALWAYS = ("cpu", "meta")


def load_model(
    reference: str | os.PathLike[str],
    *,
    donors: Any = None,
    revision: str | None = None,
    keep_replaced: bool = False,
    held_back: HeldBack | None = None,
    quantize_donors: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a causal language model from any kind of repository.

    Args:
        reference: Hub id or folder.
        donors: As in `AutoModelWithTransplant.from_pretrained`.
        revision: Branch, tag or commit.
        keep_replaced: Also load layers that donors replace.
        held_back: Returns how many of the first layers stay in their files.
        quantize_donors: Whether a `quantization_config` is for donors too.
        **kwargs: As in `from_pretrained`.
    """
    check_device_map(kwargs.get("device_map"))
    name, gguf_file, hub = os.fspath(reference), kwargs.pop("gguf_file", None), HubOptions.from_kwargs(kwargs)
    check_gguf_reader(gguf_file)
    revision = revision_for(name, revision)
    if gguf_file is None:
        _refuse_without_model(name, revision)
        path = locate(name, files=("config.json",), revision=revision, hub=hub).folder / "config.json"
        fields = read_json(path, "config.json") if path.exists() else {}
        if fields.get("model_type") == TransplantConfig.model_type:
            donors = donors or ()
    if donors is not None:
        how: dict[str, Any] = {
            "gguf_file": gguf_file,
            "revision": revision,
            "keep_replaced": keep_replaced,
            "held_back": held_back,
            "quantize_donors": quantize_donors,
        }
        return load_transplant(AutoModelForCausalLM, name, donors=donors or None, **how, **kwargs)
    return _load_plain(name, revision, gguf_file, hub, held_back, kwargs)


def _load_plain(
    name: str,
    revision: str | None,
    gguf_file: str | None,
    hub: HubOptions,
    held_back: HeldBack | None,
    kwargs: dict[str, Any],
) -> Any:
    """Load a model without donors as a transplant is loaded: for this thread only, without changing the process."""
    trust = kwargs.pop("trust_remote_code", None)
    for_model = {key: kwargs.pop(key) for key in FOR_MODEL if key in kwargs}
    for_config = {key: value for key, value in kwargs.items() if key not in hub.as_kwargs()}
    found = open_recipient(
        name, revision, hub, gguf_file=gguf_file, trust_remote_code=trust, kwargs=for_config, what="model"
    )
    try:
        model_class, config = found.model_class(AutoModelForCausalLM)
    except CompatibilityError as error:
        raise ConfigurationError(f"cannot load model {name}: {error}") from error
    where = (found.reference, found.revision)
    made_class: Any = transplant_class(model_class)
    arguments = {
        "revision": found.revision or "main",
        "trust_remote_code": trust,
        **hub.as_kwargs(),
        **found.unused_kwargs,
        **for_model,
    }
    blueprint = _without_donors(found, config) if held_back is not None else None
    count = held_back(blueprint) if held_back is not None and blueprint is not None else 0
    with reading("the model", *where):
        place = for_transformers(*where, hub, weights=True, file=gguf_file)
        if blueprint is not None and count:
            model = from_pretrained(made_class, blueprint, place, held_back=lambda _: count, **arguments)
        else:
            model = made_class.from_pretrained(place, config=config, **arguments)
            model.__class__ = model_class
    model.config.name_or_path = model.name_or_path = name
    forget_gguf(model)
    return model


def _without_donors(found: Recipient, config: PreTrainedConfig) -> Blueprint:
    """The blueprint of a recipient to which donors are added later."""
    recipient = dataclasses.replace(found.anatomy(), config=config)
    refuse_unsupported(recipient)
    own = TransplantConfig(recipient=found.reference, recipient_revision=found.revision)
    return Blueprint(recipient, own).with_built_config(config)


def load_tokenizer(reference: str, revision: str | None, hub: HubOptions, gguf_file: str | None = None) -> Any:
    """Load the tokenizer beside a model."""
    revision = revision_for(reference, revision)
    source = locate_with_companions(reference, revision=revision, hub=hub)
    if not has_tokenizer(source.folder):
        if gguf_file is None:
            return None
        with reading("the tokenizer", reference, revision):
            place = for_transformers(reference, source.revision, hub, weights=False, file=gguf_file)
            return AutoTokenizer.from_pretrained(
                place, revision=source.revision, gguf_file=gguf_file, **hub.as_kwargs()
            )
    with reading("the tokenizer", reference, revision):
        return AutoTokenizer.from_pretrained(source.folder)


def _refuse_without_model(name: str, revision: str | None) -> None:
    folder = points_to_folder(name, revision=revision)
    if folder is None or (folder / "config.json").is_file():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"{name!r} is neither a folder (looked for {folder}) nor a Hub id.")
    held = sorted(path.name for path in folder.iterdir())
    what = f"it holds {some_of(held)}" if held else "it is empty"
    hint = (
        ", or name its GGUF file with gguf_file= (--gguf-file)" if any(file.endswith(".gguf") for file in held) else ""
    )
    raise ConfigurationError(
        f"there is no model in {name}: no config.json ({what}). Name a folder that save_pretrained wrote, or a Hub "
        f"id{hint}."
    )


def check_device_map(device_map: Any) -> None:
    """Refuse a device that is not there, before anything is downloaded or read."""
    if not isinstance(device_map, str | int | torch.device) or device_map in _SPREAD:
        return
    there = torch.accelerator.current_accelerator(check_available=True)
    known = [] if there is None else [f"{there.type}:{number}" for number in range(torch.accelerator.device_count())]
    try:
        device = torch.device(device_map)
    except RuntimeError:  # no such word, or a number without accelerators
        device = None
    if device is None or (device.type not in _ALWAYS and f"{device.type}:{device.index or 0}" not in known):
        raise ConfigurationError(
            f"device_map={device_map!r} (--device-map) is not a device of this machine, which has "
            f"{', '.join([*_ALWAYS[:1], *known])} (torch {torch.__version__}). Name one of these or one of "
            f"{', '.join(_SPREAD)}."
        )


def pinned_commit(reference: str, revision: str | None, kwargs: Mapping[str, Any]) -> str | None:
    """Return the commit that a model on the Hub is at; `None` for a folder.

    Transformers forgets it once a model is loaded.
    """
    revision = revision_for(reference, revision)
    if points_to_folder(reference, revision=revision) is not None:
        return None
    return commit_of(reference, revision, HubOptions.from_kwargs(kwargs), kwargs.get("gguf_file"))
