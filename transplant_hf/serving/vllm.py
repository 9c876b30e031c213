"""A plug-in for vLLM: it serves a transplant or a donor as it is, without an export.

vLLM finds `register` in the entry points of this package and calls it in each of its processes. The configuration is
read in the first process and pins every revision; each worker reads the weights that this configuration names.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
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

FORMAT = "transplant"  # of --config-format and --load-format
_FIELD = "transplant"  # of the native configuration: the transplant that it was made from
_USAGE = f"--config-format {FORMAT} --load-format {FORMAT}"


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
            f"{recipient} is quantized and its donors are not, and vLLM is not given both here. Name a "
            "recipient in full precision; for one in MXFP4, `transplant-hf export` writes such a checkpoint."
        )
    if config.recipient_quantization is not None:
        method = config.recipient_quantization["config"]["quant_method"]
        raise ConfigurationError(
            f"recipient_quantization asks for {method}, which only Transformers applies at load. Remove it from "
            "config.json to serve in full precision, or quantize an export."
        )


def refuse_other_windows(config: PreTrainedConfig, windows: Mapping[int, int | None]) -> None:
    """Refuse a model whose layers do not have the kind of attention that their configuration says.

    The windows are the sliding windows of vLLM's layers by number, `None` for full attention.
    """
    sliding = {"sliding_attention": True, "full_attention": False}
    kinds: list[Any] = [sliding.get(kind) for kind in getattr(config.get_text_config(), "layer_types", None) or ()]
    wrong = [n for n, kind in enumerate(kinds) if n in windows and kind not in (None, windows[n] is not None)]
    if wrong:
        raise ConfigurationError(
            f"vLLM derives the kind of attention of a {config.model_type} layer from its number, not from "
            f"layer_types: layer {wrong[0]} would {'not ' if kinds[wrong[0]] else ''}have a sliding window"
            f"{f', and {len(wrong) - 1} more would differ' if len(wrong) > 1 else ''}. Insert donors so that the kinds "
            "of layers repeat as in the recipient, or load the transplant with Transformers."
        )


# -- What vLLM calls -------------------------------------------------------------------------------------------------


def parsed_config(model: str | os.PathLike[str], trust_remote_code: bool, revision: str | None, token: Any) -> Any:
    """Return the native configuration of a transplant, with the transplant itself, pinned, in a field of its own."""
    native = open_native(
        model, revision=_revision(model, revision), trust_remote_code=trust_remote_code, hub=HubOptions(token=token)
    )
    config = native.native_config()
    setattr(config, _FIELD, native.config.to_dict())
    return config


def planned(model_config: Any, load_config: Any) -> NativeTransplant:
    """Open the transplant again that a configuration was made from."""
    fields = getattr(model_config.hf_config, _FIELD, None)
    if fields is None:
        raise ConfigurationError(f"{model_config.model} was not opened as a transplant. Pass both: {_USAGE}.")
    return open_native(
        model_config.model,
        config=TransplantConfig(**fields),
        revision=_revision(model_config.model, model_config.revision),
        trust_remote_code=model_config.trust_remote_code,
        hub=HubOptions(token=model_config.hf_token, cache_dir=load_config.download_dir),
    )


def _revision(model: str | os.PathLike[str], revision: str | None) -> str | None:
    """The revision of a repository. Offline, vLLM names its folder in the cache instead, but keeps the revision."""
    return None if constants.HF_HUB_OFFLINE and os.path.isdir(model) else revision


def _refuse_options(load_config: Any) -> None:
    extra = sorted({*load_config.model_loader_extra_config} - {"enable_weights_track"})
    if load_config.safetensors_load_strategy not in (None, "lazy"):
        extra.append(f"safetensors_load_strategy={load_config.safetensors_load_strategy!r}")
    if extra:
        raise ConfigurationError(
            f"--load-format {FORMAT} reads weights one by one and does not have {', '.join(extra)}."
        )


def register() -> None:
    """Register the formats of transplants with vLLM."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.transformers_utils.config import register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    @register_config_parser(FORMAT)
    class TransplantConfigParser(ConfigParserBase):
        """Reads the native configuration of a transplant."""

        def parse(
            self, model: Any, trust_remote_code: bool, revision: Any = None, code_revision: Any = None, **kwargs: Any
        ) -> tuple[dict[str, Any], Any]:
            """Return it as vLLM's own parsers do; vLLM applies `hf_overrides` to it."""
            config = parsed_config(model, trust_remote_code, revision, kwargs.get("token"))
            return config.to_dict(), config

    @register_model_loader(FORMAT)
    class TransplantModelLoader(DefaultModelLoader):
        """Loads the weights of a transplant as vLLM loads those of a checkpoint."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            _refuse_options(load_config)

        def download_model(self, model_config: Any) -> None:
            """Download the weights of recipient and donors."""
            planned(model_config, self.load_config).files()

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Load the weights after a look at the layers that vLLM built."""
            if model_config.get_sliding_window() is not None:
                windows = {
                    extract_layer_index(name): module.sliding_window
                    for name, module in model.named_modules()
                    if isinstance(module, Attention)
                }
                refuse_other_windows(model_config.hf_config, windows)
            super().load_weights(model, model_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
            """Yield the weights that vLLM's model takes."""
            self.counter_before_loading_weights = time.perf_counter()
            yield from planned(model_config, self.load_config).weights()
