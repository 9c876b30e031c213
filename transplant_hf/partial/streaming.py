"""Hidden states before a position of a model whose first layers stay in their files.

The layers run one after another: the weights of one are read, all blocks of text pass through it, and its memory is
freed, while the next one is being read. Each is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..architecture import eval_mode
from ..display import progress_bar
from ..errors import BUILD_ERRORS, CompatibilityError, DataError, TransplantError
from ..layer_map import RECIPIENT
from ..model.layers_in_files import LayersInFiles, layers_in_files
from ..model.strength import is_entrance
from ..storage import locked
from .cache import PrefixCache
from .running import PREFIX_STATES, PartialRun, stack_of
from .state_files import StateFiles, StatesInMemory
from .states import block_ids, block_states, refuse_not_finite

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
    run = _Run(model, held, texts, batch_size, autocast, quiet)
    with eval_mode(model), run.ended():
        shapes = [(len(text.numbers), *run.sample(text, 1, None).shape[1:]) for text in texts]
        dtype = run.sample(texts[0], 1, 2).dtype
        if folder is None:
            memory = StatesInMemory(shapes, dtype, limit)
            run.through(memory, position)
            rows = memory.rows
        else:
            about = {**(identity or {}), "position": position, "files": held.files, "shapes": shapes}
            about |= {"dtype": str(dtype), "batch_size": batch_size, "layers": _layers_before(model, position)}
            key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
            files = StateFiles(folder / key, shapes, dtype, position, limit, temporary)
            with locked(files.make_folder(), lambda: _say_waiting(files)):
                files.open()
                run.through(files, position)
            rows = files.rows()
    caches = [PrefixCache(part, text.numbers, position) for part, text in zip(rows, texts, strict=True)]
    return StreamedStates(texts, caches, time.perf_counter() - began)


class _Run:
    """One pass of texts through the first layers of a model."""

    def __init__(
        self, model: Any, held: LayersInFiles, texts: Sequence[Text], batch_size: int, autocast: Any, quiet: bool
    ) -> None:
        self._model, self._held, self._texts = model, held, texts
        self._batch_size, self._quiet = batch_size, quiet
        self._autocast = autocast or nullcontext
        self._stack = stack_of(model)
        self._device = model.device
        self._part = PartialRun(model, [len(self._stack) - 1])
        self._pairs: list[Any] = []  # the kinds of layers that were compared
        self._reader = ThreadPoolExecutor(max_workers=1)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Free the memory of all layers in the end."""
        try:
            yield
        finally:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._held.drop()

    def sample(self, text: Text, rows: int, tokens: int | None) -> torch.Tensor:
        """Return what enters the first layer for the beginning of a text."""
        return self._states_after(0, self._ids(text, text.numbers[:rows])[:, :tokens], None)

    def through(self, states: StateFiles | StatesInMemory, position: int) -> None:
        """Let all texts pass through the layers that they have not passed yet."""
        first = states.layers_done
        units = [unit for unit in _units(self._stack, position) if unit[0] >= first]
        blocks = sum(len(text.numbers) for text in self._texts)
        with progress_bar(len(units) * blocks, "Hidden states", unit="block", quiet=self._quiet) as bar:
            reading = self._read(units[0]) if units else None
            before: tuple[range, torch.Tensor | None, torch.Tensor] | None = None
            ids = self._ids(self._texts[0], self._texts[0].numbers[:1])[:, :_SAMPLE_TOKENS]
            for number, unit in enumerate(units):
                bar.set_description(f"Hidden states, layer {unit[-1] + 1} of {position}", refresh=False)
                assert reading is not None
                reading.result()
                entering = before[2] if before else self._stored_sample(states, unit[0], ids.shape[1])
                leaving = self._check(unit, ids, entering, before)
                if before is not None:
                    self._held.drop(before[0])
                reading = self._read(units[number + 1]) if number + 1 < len(units) else None
                self._pass_all(states, unit, bar)
                self._held.refuse_changed(unit)  # again: they are mapped
                states.finish(unit[-1] + 1)
                before = (unit, entering, leaving)
            if before is not None:
                self._check_rest(position, ids, before)

    def _pass_all(self, states: StateFiles | StatesInMemory, unit: range, bar: Any) -> None:
        self._part.choose(unit)
        with self._part:
            for place, text in enumerate(self._texts):
                for start in range(0, len(text.numbers), self._batch_size):
                    batch = text.numbers[start : start + self._batch_size]
                    entering = states.read(place, start, len(batch)) if unit[0] > 0 else None
                    found = self._states_after(unit[-1] + 1, self._ids(text, batch), entering)
                    refuse_not_finite(found, f"after layer {unit[-1]}", batch)
                    states.write(place, start, found)
                    bar.update(len(batch))

    def _read(self, unit: range) -> Future[None]:
        def load() -> None:
            for number in unit:
                self._held.load(number, self._device)

        return self._reader.submit(load)

    def _ids(self, text: Text, numbers: Sequence[int]) -> torch.Tensor:
        return block_ids(self._model, text.blocks, numbers)

    def _states_after(self, count: int, ids: torch.Tensor, entering: torch.Tensor | None) -> torch.Tensor:
        return block_states(self._model, ids, count, self._autocast, entering)

    # -- Layers that depend on more than the hidden state ------------------------------------------------------------

    def _stored_sample(self, states: StateFiles | StatesInMemory, first: int, tokens: int) -> torch.Tensor | None:
        return states.read(0, 0, 1)[:, :tokens] if first > 0 else None

    def _check(
        self,
        unit: range,
        ids: torch.Tensor,
        entering: torch.Tensor | None,
        before: tuple[range, torch.Tensor | None, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Compare layers that run alone with the same layers together with those before them; returns their output."""
        self._part.choose(unit)
        try:
            with self._part:
                alone = self._states_after(unit[-1] + 1, ids, entering)
        except TransplantError:
            raise
        except BUILD_ERRORS as error:  # what the model's own code raises
            raise self._needs_more(unit[0], f"{type(error).__name__}: {error}") from error
        if before is not None and self._is_new_pair(before[0], unit):
            self._part.choose([*before[0], *unit])
            with self._part:
                together = self._states_after(unit[-1] + 1, ids, before[1])
            self._compare(unit[0], alone, together)
        return alone

    def _is_new_pair(self, before: range, unit: range) -> bool:
        """Whether layers of these kinds were not compared twice yet, one after the other."""
        state = self._model._transplant
        slots = [stage.slot for stage in state.blueprint.running(state.disabled)]
        of_recipient = {slots[number].source for number in (*before, *unit)} == {RECIPIENT}
        if not of_recipient:
            return True
        kinds = [state.blueprint.recipient.kind(slots[number].index) for number in (*before, *unit)]
        self._pairs.append(kinds)
        return self._pairs.count(kinds) <= 2

    def _check_rest(
        self, position: int, ids: torch.Tensor, before: tuple[range, torch.Tensor | None, torch.Tensor]
    ) -> None:
        """Compare the rest of the model alone with the same together with the last layers before it."""
        logits = []
        for numbers, entering in (
            (range(position, len(self._stack)), before[2]),
            ([*before[0], *range(position, len(self._stack))], before[1]),
        ):
            prefix = {} if entering is None else {PREFIX_STATES: entering}
            self._part.choose(numbers)
            with self._part, self._autocast():
                logits.append(self._model(input_ids=ids, use_cache=False, **prefix).logits.cpu())
        self._compare(position, *logits)

    def _compare(self, number: int, alone: torch.Tensor, together: torch.Tensor) -> None:
        alone, together = alone.float(), together.float()
        difference = float((alone - together).norm() / together.norm().clamp_min(1e-12))
        if not difference <= _TOLERANCE * (1 if self._model.dtype == torch.float32 else 10):
            raise self._needs_more(number, f"alone, its output differs by {difference:.2g}")

    def _needs_more(self, number: int, reason: str) -> CompatibilityError:
        return CompatibilityError(
            f"layer {number} of {type(self._model).__name__} needs more than the hidden state before it ({reason}), so "
            "that layers cannot be read one at a time. Leave out stream_prefix (--stream-prefix)."
        )


def _units(stack: Any, position: int) -> list[range]:
    """The layers that run together: scaled donors need the state that entered their first layer."""
    starts = [number for number in range(position) if is_entrance(stack[number])]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], position], strict=True)]


def _layers_before(model: Any, position: int) -> list[Any]:
    layers = [list(slot) for slot in model.layer_map][:position]
    names = {source for source, _ in layers}
    return [layers, {name: value for name, value in model.strengths.items() if name in names}]


def _say_waiting(files: StateFiles) -> None:
    logger.warning(f"another run computes the same hidden states in {os.fspath(files.folder)}: waiting for it.")
