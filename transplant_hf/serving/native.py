"""A transplant for a program that builds models itself: its native configuration, and its weights one by one."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..architecture import LayerNames, Recipient
from ..config import TransplantConfig
from ..errors import CheckpointError, ConfigurationError
from ..exporting.checkpoint import refuse_adapters, refuse_beyond_native
from ..heads import CAUSAL_LM, head_of
from ..model.load_request import find_parts, read_request
from ..model.load_weights import FileChecks
from ..sources import HubOptions
from ..splice import Blueprint, checkpoint_files, merge_weights, open_checkpoint


@dataclasses.dataclass(frozen=True)
class NativeTransplant:
    """A transplant that a native configuration describes; no weight is read yet."""

    config: TransplantConfig  # with every revision pinned
    recipient: Recipient
    blueprint: Blueprint

    def native_config(self) -> PreTrainedConfig:
        """Return the configuration that an export would have."""
        config = copy.deepcopy(self.blueprint.built_config.config)
        config.architectures = [self.blueprint.recipient.model_class.__name__]
        if getattr(config, "auto_map", None) is not None:
            del config.auto_map
        return config

    def files(self) -> list[Path]:
        """Return the recipient's weight files, downloaded if it is a repository."""
        files = checkpoint_files(self.recipient.reference, self.recipient.revision, self.recipient.hub)
        if not files:
            raise CheckpointError(
                f"{self.recipient} has no complete set of weight files (model.safetensors, or shards)."
            )
        return files

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight by the name that it has in an export, read when its turn comes.

        Errors of donors come at the end: weights that are not finite, and a sha256 that is not the recorded one.
        """
        names = LayerNames(self.blueprint.recipient.model, self.blueprint.recipient.stack_path)
        with FileChecks(part.donor for part in self.blueprint.parts) as checks:
            tensors, provenance = open_checkpoint([str(file) for file in self.files()], None, True)
            merged = merge_weights(self.blueprint, tensors, provenance, names)
            for name in sorted(merged.tensors):
                parts = names.split(name)
                # Layers past the end, for multi-token prediction, are not the model's.
                if parts is None or parts.number < len(self.blueprint.built):
                    yield name, merged.tensors[name][...]
            checks.result()
            merged.refuse_not_finite()


def open_native(
    asked: str | os.PathLike[str],
    *,
    config: TransplantConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    hub: HubOptions,
) -> NativeTransplant:
    """Open a transplant or a donor by configurations and headers, and refuse what no native configuration describes.

    A `config` is loaded instead of the one that is written there.
    """
    request = read_request(asked, config=config, revision=revision, hub=hub)
    parts = find_parts(request, hub, trust_remote_code)
    refuse_adapters(request, parts.recipient)
    _refuse_quantization(parts.recipient, parts.config)
    head = head_of(parts.recipient.config.architectures or (), parts.recipient.config) or CAUSAL_LM
    blueprint = parts.blueprint(head.find())
    refuse_beyond_native(blueprint)
    return NativeTransplant(parts.config, parts.recipient, blueprint)


def _refuse_quantization(recipient: Recipient, config: TransplantConfig) -> None:
    if getattr(recipient.config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"{recipient} is quantized and its donors are not, and inference engines are not given both here. Name a "
            "recipient in full precision; for one in MXFP4, `transplant-hf export` writes such a checkpoint."
        )
    if config.recipient_quantization is not None:
        method = config.recipient_quantization["config"]["quant_method"]
        raise ConfigurationError(
            f"recipient_quantization asks for {method}, which only Transformers applies at load. Remove it from "
            "config.json to serve in full precision, or quantize an export."
        )


def refuse_other_windows(config: PreTrainedConfig, windows: Mapping[int, int | None], engine: str) -> None:
    """Refuse a model whose layers do not have the kind of attention that their configuration says.

    The windows are the sliding windows of the engine's layers by number, `None` for full attention.
    """
    sliding = {"sliding_attention": True, "full_attention": False}
    kinds: list[Any] = [sliding.get(kind) for kind in getattr(config.get_text_config(), "layer_types", None) or ()]
    wrong = [n for n, kind in enumerate(kinds) if n in windows and kind not in (None, windows[n] is not None)]
    if wrong:
        raise ConfigurationError(
            f"{engine} derives the kind of attention of a {config.model_type} layer from its number, not from "
            f"layer_types: layer {wrong[0]} would {'not ' if kinds[wrong[0]] else ''}have a sliding window"
            f"{f', and {len(wrong) - 1} more would differ' if len(wrong) > 1 else ''}. Insert donors so that the kinds "
            "of layers repeat as in the recipient, or load the transplant with Transformers."
        )
