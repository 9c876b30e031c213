"""What `evaluate`, `strength_curve` and `sweep` share: a model, and the texts that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError
from ..texts.documents import check_texts
from .losses import Perplexity, perplexity_of_windows
from .models_and_texts import LoadedModel, model_to_measure, read_windows
from .streamed import Streams, layers_to_stream

__all__ = ["Measurement"]


class Measurement:
    """A model that is loaded, and texts that are cut into windows for it; arguments as in `evaluate`.

    With `stream`, layers before all `positions` stay in files, too.
    """

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
        stream: bool = False,
        positions: Sequence[int] = (),
        quiet: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(texts, Mapping) and not texts:
            raise ConfigurationError("there is no text to measure on. Pass texts={'name': text}.")
        check_texts(texts)
        self.kwargs, self.stride, self.batch_size, self.quiet = kwargs, stride, batch_size, quiet
        self._positions = positions if stream else None  # all layers before them stay in files
        self.loaded = self.load(model, revision)
        self.model = self.loaded.model
        self.windows = read_windows(
            self.loaded, texts, tokenizer, block_length, stride, max_tokens, token=kwargs.get("token"), quiet=quiet
        )
        self._streams = Streams(self.windows, batch_size, quiet)

    def load(self, model: Any, revision: str | None = None) -> LoadedModel:
        """Load a model by its name, as the one that is measured; a model that is loaded is returned unchanged."""
        held_back = None if self._positions is None else layers_to_stream(model, self.kwargs, self._positions)
        return model_to_measure(model, revision, self.kwargs, held_back)

    def perplexities(self, model: Any = None) -> dict[str, Perplexity]:
        """Measure a model on all texts, by default the one that was loaded, in the state it is in."""
        model = self.model if model is None else model
        with self._streams.running(model):
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
