"""Recipients and other models, by their configuration and the headers of their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..architecture import Anatomy, LayerNames, apply_overrides, native_class, text_config
from ..architecture.build import BUILD_ERRORS
from ..compatibility import refuse_unsupported
from ..config import TransplantConfig
from ..errors import CompatibilityError, ConfigurationError
from ..sources import HubOptions, Source, reading
from ..storage import read_json
from .files import BIN_FILES, MODEL_FILE, MODEL_INDEX, Files
from .findings import ModelInspection
from .headers import TensorHeader
from .weights import read_weights, summary

__all__ = ["Look", "inspect_model", "look_at"]

# Building a model to look at it takes time for each layer; a larger number is a mistake or an attack.
_MOST_LAYERS = 2000


@dataclasses.dataclass(frozen=True)
class Look:
    """A recipient looked at.

    Args:
        source: Where its configuration was found.
        anatomy: Its structure.
    """

    source: Source
    anatomy: Anatomy


def look_at(
    reference: str,
    revision: str | None,
    relative_to: Source | None,
    hub: HubOptions,
    overrides: Mapping[str, Any] | None = None,
) -> Look:
    """Look at a recipient by its configuration, with what a transplant sets in it.

    Raises:
        TransplantError: Out of reach, or no model that can be looked at.
    """
    files = Files.find(reference, hub, revision=revision, relative_to=relative_to, small=("config.json",))
    path = files.folder / "config.json"
    if not path.exists():
        raise ConfigurationError(f"recipient {files.source} is no model: it has no config.json.")
    fields = read_json(path, "the recipient's config.json")
    return Look(files.source, _anatomy(files.source, fields, overrides))


def _anatomy(source: Source, fields: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Anatomy:
    if fields.get("model_type") == TransplantConfig.model_type:
        raise ConfigurationError(f"recipient {source} is itself a transplant, of {fields.get('recipient')!r}.")
    config = _config(source)
    apply_overrides(config, overrides or {}, {})
    layers = getattr(text_config(config).config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ConfigurationError(f"{source} claims {layers:,} layers; models of up to {_MOST_LAYERS:,} are looked at.")
    return Anatomy(*native_class(AutoModelForCausalLM, config, str(source)), f"recipient {source}")


def _config(source: Source) -> PreTrainedConfig:
    with reading("the configuration", str(source)):
        try:
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        except OSError:
            raise
        except BUILD_ERRORS as error:
            sentence = str(error).strip().partition("\n")[0]
            raise ConfigurationError(f"{source} is no model that can be looked at: {sentence}") from error


def inspect_model(files: Files, fields: Mapping[str, Any], what: str, verify: bool) -> ModelInspection:
    """Inspect a model of Transformers' own kind.

    Args:
        files: Its files.
        fields: Its configuration, as JSON.
        what: What was asked about.
        verify: Hash its files and compare them with what the Hub lists.

    Raises:
        ConfigurationError: Not a model.
        CheckpointError: Malformed weights.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigurationError(f"{files.source} is not a model: its config.json has model_type {model_type!r}.")
    anatomy: Anatomy | None = None
    reason: str | None = None
    try:
        anatomy = _anatomy(files.source, fields)
        refuse_unsupported(anatomy)
    except (CompatibilityError, ConfigurationError) as error:
        reason = str(error)
    if anatomy is not None and not _has_layers(anatomy):
        anatomy = None
    notes, tensors, weights = [], None, None
    names = _weight_files(files)
    if names is None:
        notes.append(_why_no_weights(files))
    else:
        tensors = read_weights(files, names, MODEL_INDEX)
        findings, problems = summary(files, tensors, {}, verify)
        weights = dataclasses.replace(findings, per_layer=_per_layer(anatomy, tensors.flat()))
    layers = anatomy.num_layers if anatomy is not None else None
    return ModelInspection(
        what=what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems) if weights is not None else (),
        model_type=model_type,
        architecture=anatomy.model_class.__name__ if anatomy is not None else _written_class(fields),
        num_layers=layers,
        positions=(0, layers) if layers is not None else None,
        hidden_size=_hidden_size(anatomy),
        movable=reason is None,
        reason=reason,
        sharing_layers=tuple(sorted(anatomy.sharing_layers)) if anatomy is not None else (),
        weights=weights,
    )


def _has_layers(anatomy: Anatomy) -> bool:
    try:
        return anatomy.num_layers > 0
    except CompatibilityError:  # already the reason why donors cannot be put in
        return False


def _written_class(fields: Mapping[str, Any]) -> str | None:
    written = fields.get("architectures")
    return str(written[0]) if isinstance(written, list) and written else None


def _hidden_size(anatomy: Anatomy | None) -> int | None:
    found = getattr(text_config(anatomy.config).config, "hidden_size", None) if anatomy is not None else None
    return found if isinstance(found, int) else None


def _weight_files(files: Files) -> str | None:
    """The file that names the weights, or is them: in the order in which Transformers looks."""
    return next((name for name in (MODEL_FILE, MODEL_INDEX) if files.has(name)), None)


def _why_no_weights(files: Files) -> str:
    pickled = [name for name in files.names() if name in BIN_FILES]
    if pickled:
        return f"its weights are pickled ({', '.join(pickled)}), which have no headers: nothing is known of them."
    return f"no weights were found under the usual names ({MODEL_FILE}, {MODEL_INDEX})."


def _per_layer(anatomy: Anatomy | None, tensors: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    if anatomy is None:
        return ()
    names = LayerNames(anatomy.model, anatomy.stack_path)
    counts = [0] * anatomy.num_layers
    for name, tensor in tensors.items():
        try:
            parts = names.split(name)
        except CompatibilityError:  # its layer's number is computed while loading: it stays with none
            continue
        if parts is not None and parts.number < len(counts):
            counts[parts.number] += tensor.num_elements
    return tuple(counts) if any(counts) else ()
