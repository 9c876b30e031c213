"""Hidden states before a position of a model whose first layers stay in their files.

The layers run one after another: the weights of one are read, all blocks of text pass through it, and its memory is
freed, while the next one is being read. Each is read once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..architecture import eval_mode
from ..display import progress_bar
from ..errors import BUILD_ERRORS, CompatibilityError, DataError, TransplantError
from ..model.layers_in_files import layers_in_files
from ..model.strength import is_entrance
from ..storage import locked
from .cache import PrefixCache, StateFiles, StatesInMemory, check_limit
from .running import PREFIX_STATES, PartialRun, block_ids, block_states, refuse_not_finite, stack_of

__all__ = ["StreamedStates", "Text", "layers_in_memory", "reason_against_streaming", "stream_prefix"]

logger = logging.get_logger(__name__)

_SAMPLE_TOKENS = 8
_TOLERANCE = 1e-3  # for float32; the two ways to run two layers do the same computations


class Text(NamedTuple):
    """Blocks of text that pass through the layers."""

    blocks: Any  # indexed by number; each gives `input_ids` `[tokens]`, all of one length
    numbers: Sequence[int]  # those to compute


class StreamedStates:
    """The hidden states of several texts before a position."""

    def __init__(self, texts: Sequence[Text], caches: Sequence[PrefixCache], seconds: float) -> None:
        self.caches = tuple(caches)
        self.seconds = seconds
        self._texts = tuple(texts)

    @cached_property
    def _rows(self) -> dict[bytes, tuple[PrefixCache, int]]:
        found: dict[bytes, tuple[PrefixCache, int]] = {}
        for text, cache in zip(self._texts, self.caches, strict=True):
            for number in text.numbers:
                ids = text.blocks[number]["input_ids"]
                # Of a block, perplexity reads all tokens but the last.
                found |= {_digest(ids): (cache, number), _digest(ids[:-1]): (cache, number)}
        return found

    def find(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of blocks by their tokens `[batch, tokens]`."""
        rows = []
        for ids in input_ids.cpu():
            found = self._rows.get(_digest(ids))
            if found is None:
                raise DataError(
                    "the layers before the trained part stayed in their files, and the hidden states of this text were "
                    "not computed with those of the training text. Pass it to the trainer as eval_dataset (--held-out)."
                )
            cache, number = found
            rows.append(cache[number][: len(ids)])
        return torch.stack(rows)


def _digest(ids: torch.Tensor) -> bytes:
    return hashlib.blake2b(ids.to(torch.int64).numpy().tobytes(), digest_size=16).digest()


def reason_against_streaming(model: Any, loading: Mapping[str, Any]) -> str | None:
    """Return why no layer of a model that is loaded with these arguments can stay in its files, if so."""
    if not isinstance(model, str | os.PathLike):
        return "the model is in memory already. Pass its folder or Hub id"
    if loading.get("gguf_file") is not None:
        return "a GGUF file is read as a whole"
    place = loading.get("device_map")
    if isinstance(place, Mapping) or place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return f"device_map={place!r} (--device-map) spreads the model. Name one device"
    return None


@contextmanager
def layers_in_memory(model: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Let only some layers of a model run inside a `with` block, if others stay in their files.

    Layers that are read for it keep their weights until the text has passed through them.
    """
    held = layers_in_files(model)
    if held is None:
        yield
        return
    for number in set(numbers) & set(held.absent):
        held.load(number, model.device)
    with PartialRun(model, numbers, from_embeddings=True):
        yield


def stream_prefix(
    model: Any,
    texts: Sequence[Text],
    position: int,
    *,
    batch_size: int = 16,
    folder: Path | None = None,
    temporary: bool = False,
    identity: Mapping[str, Any] | None = None,
    limit: int | None = None,
    autocast: Any = None,
    quiet: bool = False,
) -> StreamedStates:
    """Compute the hidden states of texts before a position, of which all layers stay in files, layer by layer.

    They are kept in memory, or in `folder`, where a computation that was stopped goes on after its last whole layer,
    unless the folder is `temporary`.
    `identity` is what they depend on besides the model's files: other states in the folder are not used. `autocast`
    returns the context manager under which the model will be trained.
    """
    began = time.perf_counter()
    held = layers_in_files(model)
    assert held is not None and held.count >= position
    run = _Run(model, texts, batch_size, autocast or nullcontext, quiet)
    with eval_mode(model):
        try:
            first = block_states(model, run.sample[:, :2], 0, run.autocast)
            lengths = (text.blocks[text.numbers[0]]["input_ids"].numel() for text in texts)
            shapes = [(len(text.numbers), length, first.shape[2]) for text, length in zip(texts, lengths, strict=True)]
            check_limit(shapes, first.dtype, limit)
            states: StatesInMemory | StateFiles
            if folder is None:
                states = StatesInMemory(shapes, first.dtype)
                run.through(states, position)
            else:
                about = {**(identity or {}), "position": position, "files": held.files, "shapes": shapes}
                layers = model.layer_map[:position]
                strengths = {name: value for name, value in model.strengths.items() if name in dict(layers)}
                about |= {"dtype": str(first.dtype), "batch_size": batch_size, "layers": [layers, strengths]}
                key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
                states = StateFiles(folder / key, shapes, first.dtype, position, temporary)
                message = f"another run computes the same hidden states in {folder / key}: waiting for it."
                with locked(states.make_folder(), lambda: logger.warning(message)):
                    states.open()
                    run.through(states, position)
        finally:
            held.drop()
    caches = [PrefixCache(part, text.numbers, position) for part, text in zip(states.rows, texts, strict=True)]
    return StreamedStates(texts, caches, time.perf_counter() - began)


class _Passed(NamedTuple):
    """Layers that ran together, and the hidden states of a sample before and after them."""

    layers: range
    entering: torch.Tensor | None
    leaving: torch.Tensor


class _Run:
    """One pass of texts through the first layers of a model."""

    def __init__(self, model: Any, texts: Sequence[Text], batch_size: int, autocast: Any, quiet: bool) -> None:
        self._model, self._texts, self._batch_size, self._quiet = model, texts, batch_size, quiet
        self.autocast = autocast
        self._stack = stack_of(model)
        self._part = PartialRun(model, [len(self._stack) - 1])
        self._device = model.device
        self._held: Any = layers_in_files(model)
        self.sample = block_ids(model, texts[0].blocks, texts[0].numbers[:1])[:, :_SAMPLE_TOKENS]

    def through(self, states: StateFiles | StatesInMemory, position: int) -> None:
        """Let all texts pass through the layers that they have not passed yet."""
        units = [unit for unit in _units(self._stack, position) if unit[0] >= states.layers_done]
        blocks, before = sum(len(text.numbers) for text in self._texts), None
        with (
            progress_bar(len(units) * blocks, "Hidden states", unit="block", quiet=self._quiet) as bar,
            ThreadPoolExecutor(max_workers=1) as reader,
        ):
            reading = reader.submit(self._load, units[0] if units else range(0))
            for unit, following in itertools.zip_longest(units, units[1:]):
                bar.set_description(f"Hidden states, layer {unit[-1] + 1} of {position}", refresh=False)
                reading.result()
                entering = before.leaving if before is not None else None
                if before is None and unit[0] > 0:
                    entering = states.read(0, 0, 1)[:, : self.sample.shape[1]]
                leaving = self._check(unit, entering, before, unit[-1] + 1)
                if before is not None:
                    self._held.drop(before.layers)
                reading = reader.submit(self._load, following or range(0))
                self._pass_all(states, unit, bar)
                self._held.refuse_changed(unit)  # again: they are mapped
                states.finish(unit[-1] + 1)
                before = _Passed(unit, entering, leaving)
        if before is not None:
            self._check(range(position, len(self._stack)), before.leaving, before, None)

    def _load(self, layers: range) -> None:
        for number in layers:
            self._held.load(number, self._device)

    def _pass_all(self, states: StateFiles | StatesInMemory, unit: range, bar: Any) -> None:
        self._part.choose(unit)
        with self._part:
            for place, text in enumerate(self._texts):
                for start in range(0, len(text.numbers), self._batch_size):
                    batch = text.numbers[start : start + self._batch_size]
                    entering = states.read(place, start, len(batch)) if unit[0] > 0 else None
                    ids = block_ids(self._model, text.blocks, batch)
                    found = block_states(self._model, ids, unit[-1] + 1, self.autocast, entering)
                    refuse_not_finite(found, f"after layer {unit[-1]}", batch)
                    states.write(place, start, found)
                    bar.update(len(batch))

    def _check(
        self, layers: range, entering: torch.Tensor | None, before: _Passed | None, count: int | None
    ) -> torch.Tensor:
        """Compare layers alone with the same together with those before them; return the output of the sample.

        That is the hidden state after `count` layers, or the logits.
        """
        try:
            found = self._output(layers, entering, count)
        except TransplantError:
            raise
        except BUILD_ERRORS as error:  # what the model's own code raises
            raise self._needs_more(layers[0], f"{type(error).__name__}: {error}") from error
        if before is not None:
            alone, together = found.float(), self._output([*before.layers, *layers], before.entering, count).float()
            difference = float((alone - together).norm() / together.norm().clamp_min(1e-12))
            if not difference <= _TOLERANCE * (1 if self._model.dtype == torch.float32 else 10):
                raise self._needs_more(layers[0], f"alone, its output differs by {difference:.2g}")
        return found

    def _output(self, layers: Sequence[int], entering: torch.Tensor | None, count: int | None) -> torch.Tensor:
        self._part.choose(layers)
        with self._part:
            if count is not None:
                return block_states(self._model, self.sample, count, self.autocast, entering)
            inputs = {"input_ids": self.sample, PREFIX_STATES: entering}
            with self.autocast():
                logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
            return logits.cpu()

    def _needs_more(self, number: int, reason: str) -> CompatibilityError:
        return CompatibilityError(
            f"layer {number} of {type(self._model).__name__} needs more than the hidden state before it ({reason}), so "
            "that layers cannot be read one at a time. Leave out stream_prefix (--stream-prefix)."
        )


def _units(stack: Any, position: int) -> list[range]:
    """The layers that run together: scaled donors need the state that entered their first layer."""
    starts = [number for number in range(position) if is_entrance(stack[number])]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], position], strict=True)]
