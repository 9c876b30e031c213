"""Adapters of PEFT that lie beside a configuration: Transformers loads them with the model, and so does a transplant.

One beside the recipient was trained on the recipient's layers, so it is loaded while every donor is switched off. One
beside a donor or a thin transplant was trained on all layers that run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError
from ..sources import Source
from ..storage import read_json

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILES", "base_of_adapter", "load_beside", "refuse_replaced"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = "merge it into the weights (PEFT's merge_and_unload, then save_pretrained)"


def base_of_adapter(source: Source) -> tuple[str, str | None] | None:
    """Return the model that an adapter was trained on, and its revision; `None` where there is no adapter.

    Raises:
        ConfigurationError: The adapter does not say.
    """
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


def load_beside(model: Any, where: str, name: str | None, options: Mapping[str, Any], base: str) -> None:
    """Load an adapter that was trained on a transplant.

    Args:
        model: The transplant.
        where: The adapter's folder or Hub id.
        name: What to call it, as `adapter_name` of `from_pretrained`.
        options: How to reach it, as `adapter_kwargs` of `from_pretrained`.
        base: The recipient, for messages.

    Raises:
        ConfigurationError: PEFT is missing, or the recipient has an adapter too.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(
            f"{where} holds an adapter ({ADAPTER_CONFIG}), which needs PEFT: pip install peft. To load the transplant "
            "without it, move that file away."
        )
    if model._hf_peft_config_loaded:
        raise ConfigurationError(
            f"{where} holds an adapter of the transplant, and so does its recipient {base} of its own layers; they "
            f"cannot be loaded together. Of the recipient's, {_MERGE}, or move one {ADAPTER_CONFIG} away."
        )
    model.load_adapter(where, adapter_name=name, adapter_kwargs=dict(options))


def refuse_replaced(model: Any, where: Any) -> None:
    """Refuse an adapter of the recipient where some of the recipient's layers were not loaded.

    Raises:
        ConfigurationError: Saying how to load them.
    """
    blueprint = model._transplant.blueprint
    names = [part.name for part in blueprint.parts if part.spec.mode == "replace"]
    if names and not blueprint.keep_replaced:
        raise ConfigurationError(
            f"{where} holds an adapter of the recipient's layers ({ADAPTER_CONFIG}), of which donor {names[0]!r} "
            f"replaces some. Load with keep_replaced=True; or {_MERGE}, or move that file away."
        )
