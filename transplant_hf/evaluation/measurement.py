"""What `evaluate`, `strength_curve` and `sweep` share: a model, and the texts that it is measured on.

The first layers of a model may stay in their files: each of these is read once for all texts.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..model.layers_in_files import layers_in_files
from ..model.load_weights import HeldBack
from ..partial import PartialRun, stack_of
from ..partial.cache import MOST_IN_MEMORY
from ..partial.streaming import StreamedStates, reason_against_streaming, stream_prefix
from ..splice import Blueprint
from ..texts.documents import check_texts
from .losses import Perplexity, perplexity_of_windows
from .models_and_texts import LoadedModel, model_to_measure, read_windows

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
        self._states: dict[Any, StreamedStates] = {}  # before the layers that are in memory, by model

    def load(self, model: Any, revision: str | None = None) -> LoadedModel:
        """Load a model by its name, as the one that is measured; a model that is loaded is returned unchanged."""
        held_back = None if self._positions is None else _layers_to_stream(model, self.kwargs, self._positions)
        return model_to_measure(model, revision, self.kwargs, held_back)

    def perplexities(self, model: Any = None) -> dict[str, Perplexity]:
        """Measure a model on all texts, by default the one that was loaded, in the state it is in."""
        model = self.model if model is None else model
        with self._running(model):
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

    @contextmanager
    def _running(self, model: Any) -> Iterator[None]:
        """Let the layers that are in memory run inside a `with` block; a whole model runs as it is."""
        held = layers_in_files(model)
        if held is None:
            yield
            return
        if model not in self._states:
            self._states[model] = self._streamed(model, held.count)
        rest = range(held.count, len(stack_of(model)))
        with PartialRun(model, rest, find_states=self._states[model].find):
            yield

    def _streamed(self, model: Any, position: int) -> StreamedStates:
        texts = [part for windows in self.windows for part in windows.texts()]
        tokens = sum(len(numbers) * blocks[numbers[0]]["input_ids"].numel() for blocks, numbers in texts)
        size = tokens * model.config.get_text_config(decoder=True).hidden_size * model.dtype.itemsize
        how: dict[str, Any] = {"batch_size": self.batch_size, "temporary": True, "quiet": self.quiet}
        with ExitStack() as folders:
            # Files that are mapped can be read until they are no longer used.
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory())) if size > MOST_IN_MEMORY else None
            return stream_prefix(model, texts, position, folder=folder, **how)


def _layers_to_stream(model: Any, loading: Mapping[str, Any], positions: Sequence[int]) -> HeldBack:
    """Return how many layers of a model stay in their files: those before its donors and before all `positions`.

    A model without donors keeps its last layer.
    """
    reason = reason_against_streaming(model, loading)
    if reason is not None:
        raise ConfigurationError(f"stream=True (--stream) is not possible: {reason}.")

    def count(blueprint: Blueprint) -> int:
        slots = [stage.slot for stage in blueprint.built]
        before = len(list(itertools.takewhile(lambda slot: slot.source == RECIPIENT, slots)))
        number = min(before, len(slots) - 1, *positions)
        if number < 1:
            raise ConfigurationError(
                "stream=True (--stream) is not possible: no layer runs before position 0, so that there is nothing to "
                "stream. Measure later positions."
            )
        return number

    return count
