"""Models of which the first layers stay in their files while they are measured: each of these is read once."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..model.layers_in_files import layers_in_files
from ..model.load_weights import HeldBack
from ..partial import PartialRun, stack_of
from ..partial.cache import MOST_IN_MEMORY
from ..partial.streaming import StreamedStates, Text, reason_against_streaming, stream_prefix
from ..splice import Blueprint
from .windows import Windows

__all__ = ["Streams", "layers_to_stream", "texts_of"]


def texts_of(windows: Iterable[Windows]) -> list[Text]:
    """Return texts to measure on as texts that pass through layers, windows of one length together."""
    return [Text(text, numbers) for text in windows for numbers in text.equal_lengths()]


def layers_to_stream(model: Any, loading: Mapping[str, Any], positions: Sequence[int] = ()) -> HeldBack:
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


class Streams:
    """The hidden states of texts before the layers that are in memory, computed once for each model."""

    def __init__(self, windows: Sequence[Windows], batch_size: int, quiet: bool) -> None:
        self._windows, self._batch_size, self._quiet = windows, batch_size, quiet
        self._states: dict[Any, StreamedStates] = {}

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Let the layers that are in memory run inside a `with` block; a whole model runs as it is."""
        held = layers_in_files(model)
        if held is None:
            yield
            return
        if model not in self._states:
            self._states[model] = self._computed(model, held.count)
        rest = range(held.count, len(stack_of(model)))
        with PartialRun(model, rest, find_states=self._states[model].find):
            yield

    def _computed(self, model: Any, position: int) -> StreamedStates:
        tokens = sum(len(numbers) * text[numbers[0]]["input_ids"].numel() for text, numbers in texts_of(self._windows))
        size = tokens * model.config.get_text_config(decoder=True).hidden_size * model.dtype.itemsize
        with ExitStack() as folders:
            # Files that are mapped can be read until they are no longer used.
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory())) if size > MOST_IN_MEMORY else None
            return stream_prefix(
                model,
                texts_of(self._windows),
                position,
                batch_size=self._batch_size,
                folder=folder,
                temporary=True,
                quiet=self._quiet,
            )
