"""Hidden states before a position, computed once for each block of text: in memory, or in a file that is mapped.

A frozen prefix gives the same hidden states in every epoch. What is kept is read back one block at a time.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import CheckpointError, ConfigurationError
from ..storage import writing
from .states import hidden_states

__all__ = ["PrefixCache", "fill_cache"]

_QUICK = 1.0  # seconds, below which no progress bar is shown
_ALIKE = 1e-2


class PrefixCache:
    """The hidden states of some blocks of text before a position.

    Args:
        rows: `[blocks, tokens, hidden]`, in memory or mapped.
        numbers: Which block each row belongs to.
        position: How many layers ran.
        seconds: How long the computing took; 0 for a cache that was found on disk.
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
        return self.rows.numel() * self.rows.element_size()


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
    """Compute the hidden states before a position for some blocks of text.

    Args:
        model: The model, all of whose layers before the position are frozen.
        blocks: Indexed by number; each gives `input_ids` `[tokens]`.
        numbers: The blocks that are wanted.
        position: How many layers run.
        batch_size: Blocks for each forward pass.
        file: Where to keep them; in memory by default. A file is written whole or not at all, and mapped; one that
            holds them already is used.
        limit: Most bytes the cache may take.
        autocast: Returns a context manager under which the model is going to be trained.
        quiet: Show no progress bar.

    Returns:
        The cache.

    Raises:
        ConfigurationError: It would take more than `limit`.
        CheckpointError: The disk is full or may not be written to, or a hidden state is not finite.
    """
    began = time.perf_counter()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        sample = _states(model, blocks, numbers[:1], position, device, autocast)
        shape = (len(numbers), *sample.shape[1:])
        needed = sample[0].numel() * sample.element_size() * len(numbers)
        if limit is not None and needed > limit:
            raise ConfigurationError(
                f"the hidden states of {len(numbers)} blocks before position {position} take {needed:,} bytes, the "
                f"limit of the prefix cache is {limit:,}. Raise prefix_cache_limit, train on less text, or set "
                'cache_prefix="off".'
            )
        pieces = _pieces(model, blocks, numbers, position, device, autocast, batch_size, quiet)
        if file is not None and _holds(file, shape, sample):
            return PrefixCache(_open_rows(file, shape, sample.dtype), numbers, position)
        rows = _in_memory(pieces, shape, sample.dtype) if file is None else _in_file(pieces, shape, sample.dtype, file)
    finally:
        model.train(training)
    return PrefixCache(rows, numbers, position, time.perf_counter() - began)


def _states(
    model: Any, blocks: Any, numbers: Sequence[int], position: int, device: torch.device, autocast: Any
) -> torch.Tensor:
    ids = torch.stack([blocks[number]["input_ids"] for number in numbers]).to(device)
    if autocast is None:
        return hidden_states(model, ids, [position])[position].cpu()
    with autocast():
        return hidden_states(model, ids, [position])[position].cpu()


def _pieces(
    model: Any,
    blocks: Any,
    numbers: Sequence[int],
    position: int,
    device: torch.device,
    autocast: Any,
    batch_size: int,
    quiet: bool,
) -> Any:
    title = f"Hidden states before layer {position}"
    with tqdm(total=len(numbers), desc=title, unit="block", disable=quiet, delay=_QUICK) as progress:
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            states = _states(model, blocks, some, position, device, autocast)
            if not torch.isfinite(states).all():
                raise CheckpointError(
                    f"the hidden state before layer {position} is not finite for blocks {some[0]}..{some[-1]}: the "
                    "recipient's weights hold NaN or infinity, or its dtype is too small. Try dtype=float32."
                )
            yield states
            progress.update(len(some))


def _in_memory(pieces: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    rows = torch.empty(shape, dtype=dtype)
    done = 0
    for piece in pieces:
        rows[done : done + len(piece)] = piece
        done += len(piece)
    return rows


def _in_file(pieces: Any, shape: tuple[int, ...], dtype: torch.dtype, file: Path) -> torch.Tensor:
    with writing(file, "Nothing of the cache was kept."):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written, not mapped: a disk that fills up under a mapping ends the process.
        partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with partial.open("wb") as out:
                for piece in pieces:
                    out.write(piece.contiguous().view(torch.uint8).numpy().data)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return _open_rows(file, shape, dtype)


def _holds(file: Path, shape: tuple[int, ...], sample: torch.Tensor) -> bool:
    """Whether a file of an earlier run, or of another process of this one, has these hidden states."""
    size = torch.Size(shape).numel() * sample.element_size()
    if not file.is_file() or file.stat().st_size != size:
        return False
    first = _open_rows(file, shape, sample.dtype)[0].float()
    # Computed with others in a batch, the last digits differ.
    return bool((first - sample[0].float()).norm() <= _ALIKE * first.norm())


def _open_rows(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
