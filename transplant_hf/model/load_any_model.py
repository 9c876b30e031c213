"""Load any model by its name: a plain one, a transplant, or a donor in its recipient."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..architecture import check_gguf_reader, forget_gguf, open_recipient
from ..compatibility import refuse_unsupported
from ..config import TransplantConfig
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
    """Load a causal language model from any kind of repository; arguments as in `load_transplant`."""
    _check_device_map(kwargs.get("device_map"))
    name, gguf_file, hub = os.fspath(reference), kwargs.pop("gguf_file", None), HubOptions.from_kwargs(kwargs)
    check_gguf_reader(gguf_file)
    revision = revision_for(name, revision)
    if gguf_file is None:
        path = locate(name, files=("config.json",), revision=revision, hub=hub).folder / "config.json"
        fields = read_json(path, "config.json") if path.exists() else {}
        if fields.get("model_type") == TransplantConfig.model_type:
            donors = donors or ()
    if donors is not None:
        return load_transplant(
            AutoModelForCausalLM,
            name,
            donors=donors or None,
            gguf_file=gguf_file,
            revision=revision,
            keep_replaced=keep_replaced,
            held_back=held_back,
            quantize_donors=quantize_donors,
            **kwargs,
        )
    # Without donors, a model is loaded as a transplant is: for this thread only, without changing the process.
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
    count = 0
    if held_back is not None:  # for donors that are added later
        recipient = dataclasses.replace(found.anatomy(), config=config)
        refuse_unsupported(recipient)
        own = TransplantConfig(recipient=found.reference, recipient_revision=found.revision)
        blueprint = Blueprint(recipient, own).with_built_config(config)
        count = held_back(blueprint)
    with reading("the model", *where):
        place = for_transformers(*where, hub, weights=True, file=gguf_file)
        if count:
            model = from_pretrained(made_class, blueprint, place, held_back=lambda _: count, **arguments)
        else:
            model = made_class.from_pretrained(place, config=config, **arguments)
            model.__class__ = model_class
    model.config.name_or_path = model.name_or_path = name
    forget_gguf(model)
    return model


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


def _check_device_map(device_map: Any) -> None:
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
    """Return the commit that a model on the Hub is at, which Transformers forgets; `None` for a folder."""
    revision = revision_for(reference, revision)
    if points_to_folder(reference, revision=revision) is not None:
        return None
    return commit_of(reference, revision, HubOptions.from_kwargs(kwargs), kwargs.get("gguf_file"))
