"""Models that may be recipients: their configuration and the headers of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architecture import Anatomy, LayerNames, open_recipient, text_config
from ..compatibility import refuse_unsupported
from ..donor.tensors import TensorInfo
from ..errors import CompatibilityError, ConfigurationError
from ..sources import HubOptions
from .files import BIN_FILES, MODEL_FILES, Files, all_tensors
from .findings import ModelInspection, Weights
from .weights import summarize_weights

__all__ = ["inspect_model"]


def inspect_model(files: Files, fields: Mapping[str, Any], what: str, verify: bool, hub: HubOptions) -> ModelInspection:
    """Inspect a model of a class of Transformers."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigurationError(f"{files.source} is not a model: its config.json has model_type {model_type!r}.")
    anatomy, reason = _anatomy(files, hub)
    layers = anatomy.num_layers if anatomy is not None else None
    weights, problems, notes = _weights(files, anatomy, verify)
    architectures = fields.get("architectures")
    written = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    hidden_size = getattr(text_config(anatomy.config), "hidden_size", None) if anatomy is not None else None
    return ModelInspection(
        what=what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        model_type=model_type,
        architecture=anatomy.model_class.__name__ if anatomy is not None else written,
        num_layers=layers,
        positions=(0, layers) if layers is not None else None,
        hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        movable=reason is None,
        reason=reason,
        sharing_layers=tuple(sorted(anatomy.sharing_layers)) if anatomy is not None else (),
        weights=weights,
    )


def _anatomy(files: Files, hub: HubOptions) -> tuple[Anatomy | None, str | None]:
    """Return the model's structure if its layers can be found, and why donors cannot be put between them, if so."""
    anatomy: Anatomy | None = None
    source = files.source
    try:
        found = (
            open_recipient(".", None, hub, relative_to=source)
            if source.subfolder
            else open_recipient(source.reference, source.revision, hub)
        )
        anatomy = found.anatomy()
        refuse_unsupported(anatomy)
    except (CompatibilityError, ConfigurationError) as error:
        reason = str(error)
        try:
            return (anatomy if anatomy is not None and anatomy.num_layers else None), reason
        except CompatibilityError:
            return None, reason
    return anatomy, None


def _weights(files: Files, anatomy: Anatomy | None, verify: bool) -> tuple[Weights | None, list[str], list[str]]:
    """Return what the weight files hold, how they differ from what the Hub lists, and notes."""
    if not any(files.has(name) for name in MODEL_FILES):
        pickled = ", ".join(name for name in files.names() if name in BIN_FILES)
        if pickled:
            return None, [], [f"its weights are pickled ({pickled}) and have no headers, so nothing is known of them."]
        return None, [], [f"no weights were found under the usual names ({', '.join(MODEL_FILES)})."]
    headers = files.headers(MODEL_FILES)
    per_layer = _per_layer(anatomy, all_tensors(headers)) if anatomy is not None else ()
    weights, problems = summarize_weights(files, headers, {}, verify, per_layer)
    return weights, problems, []


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
