"""Measure a model on texts in several states: the untouched recipient, with its donors, and at several strengths.

The first layers of a model may stay in their files: each of these is read once for all texts.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..model.layers_in_files import layers_in_files
from ..model.load_weights import HeldBack
from ..numeric import finite_number
from ..partial import PartialRun, stack_of
from ..partial.cache import MOST_IN_MEMORY
from ..partial.streaming import StreamedStates, reason_against_streaming, stream_prefix
from ..splice import Blueprint
from ..texts.documents import check_texts
from .losses import Perplexity, perplexity_of_windows
from .models_and_texts import LoadedModel, model_to_measure, read_windows, untouched
from .reports import EvaluationReport, EvaluationRow, StrengthCurve, label_of

__all__ = ["Measurement", "evaluate", "strength_curve"]


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
        kwargs = self.kwargs
        if self._positions is not None:
            kwargs = {**kwargs, "held_back": _layers_to_stream(model, kwargs, self._positions)}
        return model_to_measure(model, revision, kwargs)

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


def evaluate(
    model: Any,
    texts: Any,
    tokenizer: Any = None,
    recipient: Any = None,
    *,
    block_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    revision: str | None = None,
    stream: bool = False,
    quiet: bool = False,
    **kwargs: Any,
) -> EvaluationReport:
    """Measure a model's perplexity on texts, and for a transplant also the untouched recipient's.

    Args:
        model: A loaded model, or the Hub id or folder of a model, a transplant or a donor.
        texts: A text, or several as `{name: text}`; a text is `Blocks`, a stream of tokens, a `TextSource`, a file, a
            folder or the Hub id of a dataset.
        tokenizer: The model's tokenizer; by default the one beside the model or its recipient.
        recipient: The model to compare with; by default the model itself with its donors switched off.
        block_length: Tokens that are read at once; by default what the model can read, at most 1024.
        stride: The distance between windows, for a sliding window; by default windows do not overlap.
        batch_size: Windows in a batch.
        max_tokens: Read at most this many tokens of each text.
        revision: The revision of a model that is named.
        stream: Leave the layers before the first donor in their files, and read each of them once: they take no memory.
        quiet: Show no progress bar.
        **kwargs: As in `from_pretrained`: `dtype`, `device_map`, `token`, ...

    Returns:
        The report, which prints as a table.

    Raises:
        DataError: Text that is missing or too short, or has tokens of another model.
        ConfigurationError: No text, no tokenizer, or a donor whose replaced layers were not kept.
        TransplantError: The model cannot be loaded.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor, transplant
        >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model = transplant(recipient, Donor.from_model(recipient, [1], name="law"), position=2)
        >>> report = evaluate(model, {"numbers": torch.arange(16)})
        >>> report.models
        ('recipient', 'with law')
    """
    measurement = Measurement(
        model,
        texts,
        tokenizer,
        block_length=block_length,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        revision=revision,
        stream=stream,
        quiet=quiet,
        **kwargs,
    )
    model, names = measurement.model, list(getattr(measurement.model, "strengths", ()))
    label = label_of(names) if names else measurement.loaded.name
    states: list[tuple[str, Any, AbstractContextManager[Any]]] = [(label, model, nullcontext())]
    if recipient is not None:
        is_name = isinstance(recipient, str | os.PathLike)
        other = measurement.load(recipient).model if is_name else recipient
        label = f"{label} (model)" if label == RECIPIENT else label
        states = [(RECIPIENT, other, untouched(other)), (label, model, nullcontext())]
    elif names:
        states.insert(0, (RECIPIENT, model, untouched(model)))
    rows = []
    for label, measured, state in states:
        with state:
            found = measurement.perplexities(measured)
        rows += [EvaluationRow(label, name, value) for name, value in found.items()]
    return EvaluationReport(tuple(rows), measurement.about)


def strength_curve(
    model: Any,
    texts: Any,
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> StrengthCurve:
    """Measure a transplant at several strengths of its donors; 0 is the untouched recipient.

    Args:
        model: A transplanted model, or the Hub id or folder of a transplant or donor.
        texts: As in `evaluate`.
        strengths: The strengths to measure.
        names: The donors whose strength is set; by default all that are inserted.
        **options: The other arguments of `evaluate`, except `recipient`.

    Returns:
        The curve. The model's strengths are restored afterwards.

    Raises:
        ConfigurationError: Not a transplant, or no donor whose strength can be set.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor, transplant
        >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model = transplant(recipient, Donor.from_model(recipient, [0], name="law"), position=1)
        >>> curve = strength_curve(model, {"noise": torch.arange(16)}, [0, 1])
        >>> list(curve.points), model.strengths
        ([0.0, 1.0], {'law': 1.0})
    """
    strengths = [finite_number(strength, "each strength") for strength in strengths]
    if not strengths:
        raise ConfigurationError("a curve needs at least one strength.")
    measurement = Measurement(model, texts, **options)
    transplanted, donors = measurement.model, _scalable_donors(measurement.loaded, names)
    before = {name: transplanted.strengths[name] for name in donors}
    points: dict[float, dict[str, Perplexity]] = {}
    try:
        for strength in strengths:
            for name in donors:
                transplanted.set_strength(name, strength)
            points[strength] = measurement.perplexities()
    finally:
        for name, strength in before.items():
            transplanted.set_strength(name, strength)
    return StrengthCurve(points, donors, measurement.about)


def _scalable_donors(loaded: LoadedModel, names: Sequence[str] | None) -> tuple[str, ...]:
    config = getattr(loaded.model, "transplant_config", None)
    inserted = [str(spec.name) for spec in config.donors if spec.mode == "insert"] if config is not None else []
    chosen = inserted if names is None else list(names)
    if not chosen or set(chosen) - set(inserted):
        raise ConfigurationError(
            f"the strength of {', '.join(chosen) or 'donors'} cannot be set. Only inserted donors have one, and those "
            f"of {loaded.reference or type(loaded.model).__name__} are {', '.join(inserted) or '(none)'}. Name a "
            "transplant with inserted donors, or add them (--donor)."
        )
    return tuple(chosen)
