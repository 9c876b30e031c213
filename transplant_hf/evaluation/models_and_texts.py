"""What is measured: a model by its name, with what was added to it or without, its tokenizer, and texts as windows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..architecture import choose_block_length
from ..config import gguf_file_of
from ..errors import ConfigurationError
from ..model.load_any_model import load_model, load_tokenizer
from ..sources import HubOptions
from ..texts import Blocks, starting_token
from ..texts.blocks import read_stream
from .losses import check_tokenizer_of
from .windows import Windows

__all__ = ["LoadedModel", "find_tokenizer", "model_to_measure", "read_windows", "untouched"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, and where it came from."""

    model: Any
    reference: str | None = None  # Hub id or folder; `None` for a model that the caller loaded
    revision: str | None = None  # the one that was asked for
    hub: HubOptions = dataclasses.field(default_factory=HubOptions)
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """The last part of its name."""
        known = self.reference or getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        return os.path.basename(known.rstrip("/\\")) or known


def model_to_measure(model: Any, revision: str | None = None, kwargs: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load a model by its name; a model that is already loaded is returned unchanged."""
    kwargs = dict(kwargs or {})
    if isinstance(model, str | os.PathLike):
        reference = os.fspath(model)
        loaded = load_model(reference, revision=revision, keep_replaced=True, **kwargs)
        return LoadedModel(loaded, reference, revision, HubOptions.from_kwargs(kwargs), kwargs.get("gguf_file"))
    if revision is not None or kwargs:
        names = ", ".join([*(["revision"] if revision is not None else []), *kwargs])
        raise ConfigurationError(f"{names}: these are for loading a model by its name, but a loaded model was given.")
    return LoadedModel(model)


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Switch off what was added to a model inside a `with` block: donors, and adapters of PEFT."""
    with ExitStack() as off:
        if getattr(model, "strengths", None):
            off.enter_context(model.disable_transplants())
        if hasattr(model, "peft_config") and hasattr(model, "disable_adapter"):
            off.enter_context(model.disable_adapter())
        elif getattr(model, "_hf_peft_config_loaded", False):
            model.disable_adapters()
            off.callback(model.enable_adapters)
        yield


def find_tokenizer(loaded: LoadedModel) -> Any:
    """Load the tokenizer of a model, or of the recipient of a transplant."""
    places: list[tuple[str, str | None]] = []
    if loaded.reference is not None:
        places.append((loaded.reference, loaded.revision))
    config = getattr(loaded.model, "transplant_config", None)
    if config is not None:
        places.append((config.recipient, config.recipient_revision))
    elif loaded.reference is None:
        places.append((loaded.model.config.name_or_path, None))
    places = [(reference, revision) for reference, revision in places if reference]
    gguf_file = loaded.gguf_file or (None if config is None else gguf_file_of(config))
    for reference, revision in places:
        tokenizer = load_tokenizer(reference, revision, loaded.hub, gguf_file)
        if tokenizer is not None:
            return tokenizer
    searched = ", ".join(reference for reference, _ in places) or "a model without a name"
    raise ConfigurationError(f"there is no tokenizer in {searched}: save its files there, or pass tokenizer=.")


def read_windows(
    loaded: LoadedModel,
    texts: Any,
    tokenizer: Any = None,
    block_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    *,
    token: str | bool | None = None,
    quiet: bool = False,
) -> list[Windows]:
    """Read a text, or several as `{name: text}`, as windows for a model: how all text to measure on is cut."""
    model = loaded.model
    length = choose_block_length(model.config, block_length)
    windows = []
    for name, text in (texts if isinstance(texts, Mapping) else {None: texts}).items():
        if isinstance(text, Blocks):
            blocks = text if max_tokens is None else text.part(0, max(1, max_tokens // text.block_length))
            windows.append(Windows(blocks, name=name))
        elif isinstance(text, torch.Tensor):
            windows.append(Windows(text[:max_tokens], length, stride, name=name))
        else:
            tokenizer = find_tokenizer(loaded) if tokenizer is None else tokenizer
            check_tokenizer_of(model, tokenizer)
            stream, found = read_stream(text, tokenizer, max_tokens, name=name, token=token, quiet=quiet)
            windows.append(Windows(stream, length, stride, starting_token(tokenizer), found))
    return windows
