"""Open a recipient by its configuration: a folder or a repository, its commit pinned, no weights read."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..config import TransplantConfig
from ..errors import BUILD_ERRORS, CompatibilityError, ConfigurationError, TransplantError
from ..heads import auto_classes_for, model_mapping
from ..recipient_fields import is_settable
from ..sources import HubOptions, Source, at_revision, for_transformers, locate, points_to_folder, reading
from ..storage import read_json
from .anatomy import Anatomy
from .stack import text_config

# A model is built to find its layers, which takes time for each. A larger number is a mistake or an attack.
_MAX_LAYERS = 2000
# How a configuration is read, and where the model is from: not part of what a model computes.
NOT_SETTABLE = re.compile(r"_.*|auto_map|model_type|quantization_config|transformers_weights|name_or_path|\w*_file")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# Keyword arguments of Transformers that set fields of other names.
_SETS = {"num_labels": ("id2label", "label2id"), "torch_dtype": ("dtype",), "rope_scaling": ("rope_parameters",)}


class _NextHeadError(CompatibilityError, ValueError):
    """The pipeline "decision" tries `AutoModelForImageTextToText` first, and another class after a `ValueError`."""


def native_class(auto_class: Any, config: PreTrainedConfig, name: str) -> tuple[Any, PreTrainedConfig]:
    """Return the class that an Auto class would use, and the configuration it would pass to it."""
    mapping = model_mapping(auto_class)
    if type(config) not in mapping:
        what = "is not a decoder-only model" if auto_class is AutoModelForCausalLM else "has no such head"
        others = ", ".join(auto_classes_for(config))
        raise (_NextHeadError if auto_class is AutoModelForImageTextToText else CompatibilityError)(
            f"recipient {name} ({config.model_type}) {what}: {auto_class.__name__} has no class for "
            f"{type(config).__name__}. {f'These have one: {others}.' if others else ''}".rstrip()
        )
    found = mapping[type(config)]
    if isinstance(found, list | tuple):
        by_name = {option.__name__: option for option in found}
        found = next((by_name[a] for a in config.architectures or () if a in by_name), found[0])
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) == text:
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    if config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        config.is_encoder_decoder, config.is_decoder = False, True
    return found, config


@dataclasses.dataclass(frozen=True)
class Recipient:
    """A recipient, before any weight is read."""

    reference: str  # Hub id, or the absolute path of a folder
    revision: str | None  # a commit; `None` for a folder
    source: Source
    fields: Mapping[str, Any]  # its `config.json`; empty for a GGUF file without one
    config: PreTrainedConfig
    unused_kwargs: Mapping[str, Any]  # keyword arguments that are not fields of its configuration
    trust_remote_code: bool
    hub: HubOptions

    def __str__(self) -> str:
        return at_revision(self.reference, self.revision)

    def anatomy(self) -> Anatomy:
        """Return the structure of the causal language model."""
        return Anatomy(*self.model_class(AutoModelForCausalLM), f"recipient {self.reference}")

    def model_class(self, auto_class: Any) -> tuple[Any, PreTrainedConfig]:
        """Return the class that an Auto class would use, and the configuration it would pass to it."""
        own_code = (getattr(self.config, "auto_map", None) or {}).get(auto_class.__name__)
        if own_code is None or not self.trust_remote_code:
            if own_code is not None and type(self.config) not in model_mapping(auto_class):
                raise ConfigurationError(
                    f"recipient {self} needs code of its own for {auto_class.__name__} ({own_code}): Transformers has "
                    f"no class for its {type(self.config).__name__}. Read that code, then load the recipient with "
                    "trust_remote_code=True (--trust-remote-code)."
                )
            with reading("the model class", self.reference, self.revision):
                return native_class(auto_class, self.config, self.reference)
        place = for_transformers(self.reference, self.revision, self.hub, weights=False)
        kwargs = self.hub.as_kwargs()
        return get_class_from_dynamic_module(own_code, place, revision=self.revision, **kwargs), self.config


def open_recipient(
    reference: str | os.PathLike[str],
    revision: str | None = None,
    hub: HubOptions | None = None,
    *,
    relative_to: Source | None = None,
    with_weights: bool = False,
    gguf_file: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool | None = False,
    kwargs: Mapping[str, Any] | None = None,
    what: str = "recipient",
) -> Recipient:
    """Open a recipient by its configuration."""
    reference, hub, kwargs = os.fspath(reference), hub or HubOptions(), dict(kwargs or {})
    folder = points_to_folder(reference, relative_to, revision)
    inside = with_weights and folder is not None
    wanted = ("*",) if inside else ("config.json",) if gguf_file is None else (gguf_file, "config.json")
    source = locate(reference, files=wanted, revision=revision, relative_to=relative_to, hub=hub)
    commit: str | None = None
    if folder is None:
        commit = source.revision
    else:  # inside a repository too: its files are then those of one commit
        reference = str(source.folder.resolve())
    name = at_revision(reference, commit)
    path = source.folder / "config.json"
    fields = read_json(path, "the recipient's config.json") if path.exists() else {}
    if not path.exists() and gguf_file is None:
        found = sorted(file.name for file in source.folder.glob("*.gguf"))
        hint = f" To read its GGUF file, pass gguf_file={found[0]!r} (--gguf-file)." if found else ""
        raise ConfigurationError(f"cannot load {what} {name}: there is no config.json in {source.folder}.{hint}")
    if fields.get("model_type") == TransplantConfig.model_type:
        base = fields.get("recipient")
        raise ConfigurationError(
            f"recipient {name} is itself a transplant of {base}. Use {base} as the recipient and name all donors "
            "together, or save the transplant in full first."
        )
    if trust_remote_code and folder is None:
        _refuse_shadowed_code(source, fields)
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    where = for_transformers(reference, commit, hub, weights=False, file=gguf_file)
    with reading("the configuration", reference, commit):
        try:
            how = {"trust_remote_code": trust_remote_code, "return_unused_kwargs": True, **hub.as_kwargs()}
            config, unused = AutoConfig.from_pretrained(where, revision=commit, **how, **kwargs)
        except TransplantError:
            raise
        except BUILD_ERRORS as error:
            sentence = str(error).strip().partition("\n")[0]
            raise ConfigurationError(f"cannot load {what} {name}: {sentence}") from error
    config.name_or_path = reference
    apply_overrides(config, overrides or {}, kwargs)
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise ConfigurationError(
            f"cannot load {what} {name}: its config.json has {layers:,} layers, more than {_MAX_LAYERS:,}."
        )
    return Recipient(reference, commit, source, fields, config, unused, bool(trust_remote_code), hub)


def _refuse_shadowed_code(source: Source, fields: Mapping[str, Any]) -> None:
    """Refuse a recipient whose code is in another repository where a folder of that name would run instead."""
    code = fields.get("auto_map")
    for reference in code.values() if isinstance(code, dict) else ():
        name, separator, _ = str(reference).partition("--")
        if separator and os.path.exists(name):
            raise ConfigurationError(
                f"{source} runs code from the repository {name}, but the working directory {os.getcwd()} holds a "
                f"folder {name}, whose code Transformers would run instead. Rename that folder, or start in another "
                "directory."
            )


def apply_overrides(
    config: PreTrainedConfig, overrides: Mapping[str, Any], explicit: Mapping[str, Any] | None = None
) -> None:
    """Set fields of a recipient's configuration."""
    if not overrides:
        return
    try:
        _apply(config, overrides, explicit or {})
        copy.deepcopy(config).to_dict()
        _ = config.num_labels  # computed from other fields
    except BUILD_ERRORS as error:
        raise ConfigurationError(
            f"recipient_overrides ({', '.join(map(str, overrides))}) do not fit the recipient's configuration, of type "
            f"{config.model_type!r}: {error}. Correct them in config.json."
        ) from error


def _apply(config: PreTrainedConfig, overrides: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    known = {config.attribute_map.get(name, name) for name in explicit}
    known |= {field for name in explicit for field in _SETS.get(name, ())}
    for written, value in overrides.items():
        name = config.attribute_map.get(written, written)
        if name in known or known & set(_SETS.get(name, ())):
            continue
        if name in _LAYER_COUNTS or name in {config.attribute_map.get(word) for word in _LAYER_COUNTS}:
            raise ConfigurationError(
                f"{written}={value!r} cannot be set by a transplant's configuration (recipient_overrides): the number "
                "of layers is that of the pinned recipient. Remove it; donors add and replace layers."
            )
        if NOT_SETTABLE.fullmatch(name) or not is_settable(type(config), name):
            raise ConfigurationError(
                f"{written} of the recipient's configuration cannot be set by a transplant's (recipient_overrides). "
                "If from_pretrained accepts it, pass it there."
            )
        current = getattr(config, name, None)
        if isinstance(current, PreTrainedConfig) and isinstance(value, Mapping):
            inner = explicit.get(name)
            _apply(current, value, inner if isinstance(inner, Mapping) else {})
        elif name in _IMPLEMENTATIONS:
            setattr(config, f"_{name}", value)
        elif name in ("dtype", "torch_dtype"):
            config.dtype = _dtype(value)
        else:
            setattr(config, name, copy.deepcopy(value))


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value not in (None, "auto") and not isinstance(found, torch.dtype):
        raise TypeError(f"dtype={value!r} is not a dtype of torch, such as 'float32'")
    return found
