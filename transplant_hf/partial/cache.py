"""Hidden states before a position, computed once for each block of text and kept in memory or in mapped files.

A frozen prefix gives the same hidden states in every epoch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..architecture import eval_mode
from ..display import progress_bar
from ..errors import ConfigurationError
from ..storage import publish_file, writing
from .running import block_ids, block_states, refuse_not_finite

__all__ = [
    "MOST_IN_MEMORY",
    "PrefixCache",
    "StateFiles",
    "StatesInMemory",
    "check_limit",
    "fill_cache",
    "refuse_small_disk",
]

MOST_IN_MEMORY = 1 << 30  # bytes: where nothing is said, more than this is kept on disk
_TOLERANCE = 1e-2  # in a batch of another size, the last digits of a hidden state differ
_Shapes = Sequence[tuple[int, ...]]  # [blocks, tokens, hidden] of each text


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
    began, found = time.perf_counter(), False

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
        check_limit([shape], sample.dtype, limit)
        if file is None:
            rows = torch.empty(shape, dtype=sample.dtype)
            fill(lambda start, states: rows[start : start + len(states)].copy_(states))
        else:
            found = _contains(file, shape, sample)
            if not found:
                # Written, not mapped: a disk that fills up under a mapping ends the process.
                with publish_file(file) as path, path.open("wb") as out:
                    fill(lambda start, states: out.write(_as_bytes(states)))
            rows = _mapped(file, shape, sample.dtype)
    return PrefixCache(rows, numbers, position, 0.0 if found else time.perf_counter() - began)


def _contains(file: Path, shape: tuple[int, ...], sample: torch.Tensor) -> bool:
    """Whether a file of an earlier run, or of another process of this run, has these hidden states."""
    if not file.is_file() or file.stat().st_size != shape[0] * sample.nbytes:
        return False
    first = _mapped(file, shape, sample.dtype)[0].float()
    return bool((first - sample[0].float()).norm() <= _TOLERANCE * first.norm())


# -- Several texts, before and after one layer -----------------------------------------------------------------------


class StatesInMemory:
    """Hidden states in memory; each layer overwrites those of the one before."""

    layers_done = 0

    def __init__(self, shapes: _Shapes, dtype: torch.dtype) -> None:
        self.rows = [torch.empty(shape, dtype=dtype) for shape in shapes]

    def read(self, text: int, start: int, count: int) -> torch.Tensor:
        """Return some rows of a text."""
        return self.rows[text][start : start + count]

    def write(self, text: int, start: int, states: torch.Tensor) -> None:
        """Keep the rows after the layer that runs."""
        self.rows[text][start : start + len(states)] = states

    def finish(self, layers: int) -> None:
        """Go on to the next layer."""


class StateFiles:
    """Hidden states in a folder of their own: a layer reads one set of files and writes another.

    A file gets its name, with the number of layers, when it is whole. `temporary` files do not outlive the run.
    """

    def __init__(self, folder: Path, shapes: _Shapes, dtype: torch.dtype, last: int, temporary: bool = False) -> None:
        self.folder, self._last, self._temporary = folder, last, temporary
        self._shapes, self._dtype = shapes, dtype
        self._sizes = [_num_bytes([shape], dtype) for shape in shapes]
        self.layers_done = 0

    def make_folder(self) -> Path:
        """Create the folder, if the disk has room for two sets."""
        if not self.folder.exists():
            refuse_small_disk(self.folder, 2 * sum(self._sizes), self._temporary)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def open(self) -> None:
        """Find the last layer that an earlier run finished, and refuse a disk without room for the other layers.

        Files that no longer count are removed. Call it while no other process writes here.
        """
        whole = (layers for layers in range(self._last, 0, -1) if self._has(layers))
        self.layers_done = next(whole, 0)
        for path in set(self.folder.glob("*.states")) - set(self._paths(self.layers_done)):
            path.unlink()
        if self.layers_done < self._last:
            refuse_small_disk(self.folder, (1 if self.layers_done else 2) * sum(self._sizes), self._temporary)

    def read(self, text: int, start: int, count: int) -> torch.Tensor:
        """Return some rows of a text, as they are before the layer that runs."""
        return self.rows[text][start : start + count].clone()

    def write(self, text: int, start: int, states: torch.Tensor) -> None:
        """Append the rows after the layer that runs."""
        with writing(self.folder, self._kept()), self._path(text, "next").open("ab" if start else "wb") as file:
            file.write(_as_bytes(states.to(self._dtype)))

    def finish(self, layers: int) -> None:
        """Let the rows that were written be those of the last whole layer."""
        with writing(self.folder, self._kept()):
            for text, path in enumerate(self._paths(layers)):
                _sync(self._path(text, "next"))
                self._path(text, "next").replace(path)
            _sync(self.folder)
        for path in self._paths(self.layers_done):
            path.unlink(missing_ok=True)
        self.layers_done = layers

    @property
    def rows(self) -> list[torch.Tensor]:
        """The states of the last whole layer, mapped."""
        pairs = zip(self._paths(self.layers_done), self._shapes, strict=True)
        return [_mapped(path, shape, self._dtype) for path, shape in pairs]

    def _has(self, layers: int) -> bool:
        pairs = zip(self._paths(layers), self._sizes, strict=True)
        return all(path.is_file() and path.stat().st_size == size for path, size in pairs)

    def _kept(self) -> str:
        if self._temporary:
            return "Nothing is kept."
        return f"The hidden states after {self.layers_done} layers are kept: the same command goes on from there."

    def _path(self, text: int, layers: int | str) -> Path:
        return self.folder / f"text-{text}.{layers}.states"

    def _paths(self, layers: int) -> list[Path]:
        return [self._path(text, layers) for text in range(len(self._shapes))]


def _as_bytes(states: torch.Tensor) -> memoryview:
    content: memoryview = states.contiguous().view(torch.uint8).numpy().data
    return content


def _mapped(file: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def _num_bytes(shapes: _Shapes, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def check_limit(shapes: _Shapes, dtype: torch.dtype, limit: int | None) -> None:
    """Refuse hidden states that take more bytes than the limit."""
    needed = _num_bytes(shapes, dtype)
    if limit is not None and needed > limit:
        raise ConfigurationError(
            f"the hidden states take {needed:,} bytes, the limit of the prefix cache is {limit:,}. Raise "
            "prefix_cache_limit (--prefix-cache-limit), or train on less text. Without stream_prefix, cache_prefix="
            '"off" (--cache-prefix off) needs no cache.'
        )


def refuse_small_disk(folder: Path, needed: int, temporary: bool = False) -> None:
    """Refuse a folder, which need not exist, on a disk that has fewer bytes left than hidden states need."""
    place = folder.absolute()
    nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        other, less = "prefix_cache_dir (--prefix-cache-dir)", "train on less text"
        if temporary:
            other, less = "the environment variable TMPDIR", "measure less text (max_tokens, --max-tokens)"
        raise ConfigurationError(
            f"the hidden states need {needed:,} bytes on disk, and {nearest} has {free:,} bytes left. Free some space, "
            f"name another disk with {other}, or {less}."
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
