"""Hidden states before a position, computed once for each block of text and kept in memory or in a mapped file.

A frozen prefix gives the same hidden states in every epoch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..architecture import eval_mode
from ..display import progress_bar
from ..storage import writing
from .state_files import StatesInMemory, as_bytes, check_limit, mapped
from .states import block_ids, block_states, refuse_not_finite

__all__ = ["PrefixCache", "fill_cache"]

_TOLERANCE = 1e-2  # in a batch of another size, the last digits of a hidden state differ


class PrefixCache:
    """The hidden states of blocks of text before a position.

    Args:
        rows: `[blocks, tokens, hidden]`, in memory or mapped.
        numbers: The block number of each row.
        position: How many layers ran.
        seconds: How long the computation took; 0 for a cache that was found on disk.
    """

    def __init__(self, rows: torch.Tensor, numbers: Sequence[int], position: int, seconds: float = 0.0) -> None:
        self.rows = rows
        self.position = position
        self.seconds = seconds
        self._row_of = {number: row for row, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Return a block's hidden state, `[tokens, hidden]`."""
        return self.rows[self._row_of[number]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.rows.nbytes


def fill_cache(
    model: Any,
    blocks: Any,
    numbers: Sequence[int],
    position: int,
    *,
    batch_size: int = 16,
    file: Path | None = None,
    limit: int | None = None,
    autocast: Any = None,
    quiet: bool = False,
) -> PrefixCache:
    """Compute the hidden states before a position for blocks of text.

    Args:
        model: The model; all of its layers before the position are frozen.
        blocks: Indexed by number; each gives `input_ids` `[tokens]`.
        numbers: The blocks to compute.
        position: How many layers run.
        batch_size: Blocks in each forward pass.
        file: Where to keep them; in memory by default. The file is written completely or not at all, and mapped. A
            file that contains these hidden states already is used.
        limit: The largest size of the cache, in bytes.
        autocast: Returns the context manager under which the model will be trained.
        quiet: Show no progress bar.

    Returns:
        The cache.

    Raises:
        ConfigurationError: It would take more than `limit`.
        CheckpointError: The disk is full or cannot be written to, or a hidden state is not finite.
    """
    began = time.perf_counter()

    def states_of(batch: Sequence[int]) -> torch.Tensor:
        return block_states(model, block_ids(model, blocks, batch), position, autocast or nullcontext)

    def fill(write: Callable[[int, torch.Tensor], Any]) -> None:
        with progress_bar(len(numbers), f"Hidden states before layer {position}", unit="block", quiet=quiet) as bar:
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                states = states_of(batch)
                refuse_not_finite(states, f"before layer {position}", batch)
                write(start, states)
                bar.update(len(batch))

    with eval_mode(model):
        sample = states_of(numbers[:1])
        shape = (len(numbers), *sample.shape[1:])
        check_limit(len(numbers) * sample.nbytes, limit)
        if file is None:
            memory = StatesInMemory([shape], sample.dtype, None)
            fill(lambda start, states: memory.write(0, start, states))
            return PrefixCache(memory.rows[0], numbers, position, time.perf_counter() - began)
        found = _contains(file, shape, sample)
        if not found:
            with _written(file) as out:
                fill(lambda start, states: out.write(as_bytes(states)))
    seconds = 0.0 if found else time.perf_counter() - began
    return PrefixCache(mapped(file, shape, sample.dtype), numbers, position, seconds)


@contextmanager
def _written(file: Path) -> Iterator[Any]:
    """Open a file that is there as a whole after the block, or not at all."""
    with writing(file, "Nothing of the cache was kept."):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written, not mapped: a disk that fills up under a mapping ends the process.
        partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with partial.open("wb") as out:
                yield out
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _contains(file: Path, shape: tuple[int, ...], sample: torch.Tensor) -> bool:
    """Whether a file of an earlier run, or of another process of this run, has these hidden states."""
    if not file.is_file() or file.stat().st_size != shape[0] * sample.nbytes:
        return False
    first = mapped(file, shape, sample.dtype)[0].float()
    return bool((first - sample[0].float()).norm() <= _TOLERANCE * first.norm())
