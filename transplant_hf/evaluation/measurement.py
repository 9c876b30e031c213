"""What `evaluate`, `strength_curve` and `sweep` share: a model, and the texts that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError
from ..texts.documents import check_texts
from .losses import Perplexity, perplexity_of_windows
from .models_and_texts import model_to_measure, read_windows

__all__ = ["Measurement"]


class Measurement:
    """A model that is loaded, and texts that are cut into windows for it; arguments as in `evaluate`."""

    def __init__(
        self,
        model: Any,
        texts: Any,
        tokenizer: Any = None,
        *,
        block_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        revision: str | None = None,
        quiet: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(texts, Mapping) and not texts:
            raise ConfigurationError("there is no text to measure on: texts={'name': text}.")
        check_texts(texts)
        self.kwargs, self.stride, self.batch_size, self.quiet = kwargs, stride, batch_size, quiet
        self.loaded = model_to_measure(model, revision, kwargs)
        self.model = self.loaded.model
        self.windows = read_windows(
            self.loaded, texts, tokenizer, block_length, stride, max_tokens, token=kwargs.get("token"), quiet=quiet
        )

    def perplexities(self, model: Any = None) -> dict[str, Perplexity]:
        """Measure a model on all texts, by default the one that was loaded, in the state it is in."""
        model = self.model if model is None else model
        return {text.name: perplexity_of_windows(model, text, self.batch_size, self.quiet) for text in self.windows}

    @property
    def about(self) -> dict[str, Any]:
        """How it is measured, for reports."""
        return {
            "model": self.loaded.reference or self.loaded.name,
            "revision": self.loaded.revision,
            "block_length": {text.name: text.block_length for text in self.windows},
            "stride": self.stride,
        }
