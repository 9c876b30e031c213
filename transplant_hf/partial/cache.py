"""Hidden states before a position, computed once for each block of text and kept in memory or in a mapped file.

A frozen prefix gives the same hidden states in every epoch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..architecture import eval_mode
from ..display import progress_bar
from ..errors import ConfigurationError
from ..storage import writing
from .states import hidden_states, refuse_not_finite

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
    device = next(model.parameters()).device

    def states_of(some: Sequence[int]) -> torch.Tensor:
        context: AbstractContextManager[Any] = nullcontext() if autocast is None else autocast()
        ids = torch.stack([blocks[number]["input_ids"] for number in some]).to(device)
        with context:
            return hidden_states(model, ids, [position])[position].cpu()

    def all_states() -> Iterator[torch.Tensor]:
        with progress_bar(len(numbers), f"Hidden states before layer {position}", unit="block", quiet=quiet) as bar:
            for start in range(0, len(numbers), batch_size):
                some = numbers[start : start + batch_size]
                states = states_of(some)
                refuse_not_finite(states, f"before layer {position}", some)
                yield states
                bar.update(len(some))

    with eval_mode(model):
        sample = states_of(numbers[:1])
        shape = (len(numbers), *sample.shape[1:])
        size = len(numbers) * sample.nbytes
        if limit is not None and size > limit:
            raise ConfigurationError(
                f"the hidden states of {len(numbers)} blocks before position {position} take {size:,} bytes, the "
                f"limit of the prefix cache is {limit:,}. Raise prefix_cache_limit, train on less text, or set "
                'cache_prefix="off".'
            )
        if file is not None and _contains(file, shape, sample):
            return PrefixCache(_map(file, shape, sample.dtype), numbers, position)
        if file is not None:
            _write(all_states(), file)
            rows = _map(file, shape, sample.dtype)
        else:
            rows = torch.empty(shape, dtype=sample.dtype)
            for part, states in zip(rows.split(batch_size), all_states(), strict=True):
                part.copy_(states)
    return PrefixCache(rows, numbers, position, time.perf_counter() - began)


def _write(states: Iterator[torch.Tensor], file: Path) -> None:
    with writing(file, "Nothing of the cache was kept."):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written, not mapped: a disk that fills up under a mapping ends the process.
        partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with partial.open("wb") as out:
                for piece in states:
                    out.write(piece.contiguous().view(torch.uint8).numpy().data)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _contains(file: Path, shape: tuple[int, ...], sample: torch.Tensor) -> bool:
    """Whether a file of an earlier run, or of another process of this run, has these hidden states."""
    if not file.is_file() or file.stat().st_size != shape[0] * sample.nbytes:
        return False
    first = _map(file, shape, sample.dtype)[0].float()
    return bool((first - sample[0].float()).norm() <= _TOLERANCE * first.norm())


def _map(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
