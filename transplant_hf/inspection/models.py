"""Models that may be recipients: their configuration and the headers of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architecture import Anatomy, LayerNames, open_recipient, text_config
from ..compatibility import refuse_unsupported
from ..donor.tensors import TensorInfo
from ..errors import CompatibilityError, ConfigurationError
from .donors import InspectArguments
from .files import BIN_FILES, MODEL_FILES, Files, all_tensors, summarize_weights
from .findings import ModelInspection, Weights

__all__ = ["inspect_model"]


def inspect_model(files: Files, fields: Mapping[str, Any], arguments: InspectArguments) -> ModelInspection:
    """Inspect a model of a class of Transformers."""
    model_type = fields.get("model_type")
    if arguments.recipient is not None or arguments.position is not None:
        raise ConfigurationError(
            f"{files.source} is a model of type {model_type!r}, not a donor: recipient and position apply to donors, "
            "transplants and .pt files."
        )
    if not isinstance(model_type, str):
        raise ConfigurationError(f"{files.source} is not a model: its config.json has model_type {model_type!r}.")
    anatomy, reason = _anatomy(files, arguments)
    weights, problems, notes = _weights(files, anatomy, arguments.verify)
    architectures = fields.get("architectures")
    layers = hidden_size = None
    if anatomy is not None:
        layers, architectures = anatomy.num_layers, [anatomy.model_class.__name__]
        hidden_size = getattr(text_config(anatomy.config), "hidden_size", None)
    return ModelInspection(
        what=arguments.what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        model_type=model_type,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        num_layers=layers,
        positions=(0, layers) if layers is not None else None,
        hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        movable=reason is None,
        reason=reason,
        sharing_layers=tuple(sorted(anatomy.sharing_layers)) if anatomy is not None else (),
        weights=weights,
    )


def _anatomy(files: Files, arguments: InspectArguments) -> tuple[Anatomy | None, str | None]:
    """Return the model's structure if its layers can be found, and why donors cannot be put between them, if so."""
    source = files.source
    base = source if source.subfolder else None
    place = (".", None) if source.subfolder else (source.reference, source.revision)
    anatomy: Anatomy | None = None
    try:
        found = open_recipient(*place, arguments.hub, relative_to=base).anatomy()
        anatomy = found if found.num_layers else None
        refuse_unsupported(found)
    except (CompatibilityError, ConfigurationError) as error:
        return anatomy, str(error)
    return found, None


def _weights(files: Files, anatomy: Anatomy | None, verify: bool) -> tuple[Weights | None, list[str], list[str]]:
    """Return what the weight files hold, how they differ from what the Hub lists, and notes."""
    if not any(files.has(name) for name in MODEL_FILES):
        pickled = ", ".join(name for name in BIN_FILES if files.has(name))
        if pickled:
            return None, [], [f"its weights are pickled ({pickled}) and have no headers, so nothing is known of them."]
        return None, [], [f"no weights were found under the usual names ({', '.join(MODEL_FILES)})."]
    headers = files.headers(MODEL_FILES)
    per_layer = _per_layer(anatomy, all_tensors(headers)) if anatomy is not None else ()
    return *summarize_weights(files, headers, {}, verify, per_layer), []


def _per_layer(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    names = LayerNames(anatomy.model, anatomy.stack_path)
    counts = [0] * anatomy.num_layers
    for name, tensor in tensors.items():
        try:
            parts = names.split(name)
        except CompatibilityError:  # the number of its layer is computed while loading
            continue
        if parts is not None and parts.number < len(counts):
            counts[parts.number] += tensor.num_elements
    return tuple(counts) if any(counts) else ()
