"""A plug-in for vLLM: it serves a transplant or a donor as it is, without an export.

vLLM finds `register` in the entry points of this package and calls it in each of its processes. The configuration is
read in the first process and pins every revision; each worker reads the weights that this configuration names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import constants

from ..config import TransplantConfig
from ..errors import ConfigurationError
from ..sources import HubOptions
from .native import NativeTransplant, open_native, refuse_other_windows

FORMAT = "transplant"  # of --config-format and --load-format
_FIELD = "transplant"  # of the native configuration: the transplant that it was made from
_USAGE = f"--config-format {FORMAT} --load-format {FORMAT}"


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
                refuse_other_windows(model_config.hf_config, windows, "vLLM")
            super().load_weights(model, model_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
            """Yield the weights that vLLM's model takes."""
            self.counter_before_loading_weights = time.perf_counter()
            yield from planned(model_config, self.load_config).weights()
