"""Adapters of PEFT that lie beside a configuration: Transformers loads them with the model, and so does a transplant.

One beside the recipient was trained on the recipient's layers, so it is loaded while every donor is switched off. One
beside a donor or a thin transplant was trained on all layers that run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..sources import Source
from ..storage import read_json

if TYPE_CHECKING:
    from .load_request import LoadRequest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = "merge it into the weights (PEFT's merge_and_unload, then save_pretrained)"


def base_of_adapter(source: Source) -> tuple[str, str | None] | None:
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


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was trained on a transplant.

    Args:
        where: Its folder or Hub id.
        name: Its name, as `adapter_name` of `from_pretrained`.
        options: How to reach it, as `adapter_kwargs` of `from_pretrained`.
    """

    where: str
    name: str | None
    options: Mapping[str, Any]


def find_adapter(request: LoadRequest, kwargs: Mapping[str, Any]) -> tuple[Adapter | None, dict[str, Any]]:
    """Find the adapter that goes on the transplant."""
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
    return Adapter(where, kwargs.get("adapter_name"), options), others


def load_adapter_beside(model: Any, adapter: Adapter, recipient: str) -> None:
    """Load an adapter that was trained on a transplant."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(
            f"{adapter.where} holds an adapter ({ADAPTER_CONFIG}), which needs PEFT: pip install peft. To load the "
            "transplant without it, move that file away."
        )
    if model._hf_peft_config_loaded:
        raise ConfigurationError(
            f"{adapter.where} holds an adapter of the transplant, and its recipient {recipient} has one of its own "
            f"layers; they cannot be loaded together. For the recipient's, {_MERGE}, or move one {ADAPTER_CONFIG} away."
        )
    model.load_adapter(adapter.where, adapter_name=adapter.name, adapter_kwargs=dict(adapter.options))


def refuse_replaced(model: Any, where: Any) -> None:
    """Refuse an adapter of the recipient where some of the recipient's layers were not loaded."""
    blueprint = model._transplant.blueprint
    names = [part.name for part in blueprint.parts if part.spec.mode == "replace"]
    if names and not blueprint.keep_replaced:
        raise ConfigurationError(
            f"{where} holds an adapter of the recipient's layers ({ADAPTER_CONFIG}), of which donor {names[0]!r} "
            f"replaces some. Load with keep_replaced=True; or {_MERGE}, or move that file away."
        )
