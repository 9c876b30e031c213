"""Hidden states of several texts, before and after one layer: in files, of which the last whole ones survive a stop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ConfigurationError
from ..storage import read_json, write_json, writing

__all__ = ["MOST_IN_MEMORY", "StateFiles", "StatesInMemory", "as_bytes", "check_limit", "mapped", "refuse_small_disk"]

Shapes = Sequence[tuple[int, ...]]  # [blocks, tokens, hidden] of each text
MOST_IN_MEMORY = 1 << 30  # bytes: where nothing is said, more than this is kept on disk
_RECORD = "record.json"


class StatesInMemory:
    """Hidden states in memory; each layer overwrites those of the one before."""

    layers_done = 0

    def __init__(self, shapes: Shapes, dtype: torch.dtype, limit: int | None) -> None:
        check_limit(_num_bytes(shapes, dtype), limit)
        self.rows = [torch.empty(tuple(shape), dtype=dtype) for shape in shapes]

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

    A record names the number of layers of the last whole set. `limit` is for one set, in bytes. `temporary` files do
    not outlive the run.
    """

    def __init__(
        self, folder: Path, shapes: Shapes, dtype: torch.dtype, last: int, limit: int | None, temporary: bool = False
    ) -> None:
        self.folder, self._last, self._temporary = folder, last, temporary
        self._shapes, self._dtype = [tuple(shape) for shape in shapes], dtype
        self._sizes = [_num_bytes([shape], dtype) for shape in self._shapes]
        check_limit(sum(self._sizes), limit)
        self.layers_done = 0

    def make_folder(self) -> Path:
        """Create the folder, if the disk has room for two sets."""
        if not self.folder.exists():
            refuse_small_disk(self.folder, 2 * sum(self._sizes), self._temporary)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def open(self) -> None:
        """Find out how many layers an earlier run finished, and whether the disk has room for the other layers.

        Files that no longer count are removed. Call it while no other process writes here.
        """
        record = self.folder / _RECORD
        done = int(read_json(record, "the record of hidden states").get("layers", 0)) if record.is_file() else 0
        whole = all(
            path.is_file() and path.stat().st_size == size
            for path, size in zip(self._paths(done), self._sizes, strict=True)
        )
        self.layers_done = done if whole else 0
        for path in set(self.folder.glob("*.states")) - set(self._paths(self.layers_done)):
            path.unlink()
        if self.layers_done < self._last:
            refuse_small_disk(self.folder, (1 if self.layers_done else 2) * sum(self._sizes), self._temporary)

    def read(self, text: int, start: int, count: int) -> torch.Tensor:
        """Return some rows of a text, as they are before the layer that runs."""
        states = torch.empty((count, *self._shapes[text][1:]), dtype=self._dtype)
        row = self._sizes[text] // self._shapes[text][0]
        with self._path(text, self.layers_done).open("rb") as file:
            file.seek(start * row)
            file.readinto(states.view(torch.uint8).numpy().data)
        return states

    def write(self, text: int, start: int, states: torch.Tensor) -> None:
        """Append the rows after the layer that runs."""
        with writing(self.folder, self._kept()):
            path = self._path(text, None)
            # Written, not mapped: a disk that fills up under a mapping ends the process.
            with path.open("ab" if start else "wb") as file:
                file.write(as_bytes(states.to(self._dtype)))

    def finish(self, layers: int) -> None:
        """Let the rows that were written be those of the last whole layer."""
        old = self.layers_done
        with writing(self.folder, self._kept()):
            for text in range(len(self._shapes)):
                new = self._path(text, None)
                _sync(new)
                new.replace(self._path(text, layers))
            partial = self.folder / f"{_RECORD}.tmp"
            write_json(partial, {"layers": layers, "of": self._last})
            _sync(partial)
            partial.replace(self.folder / _RECORD)
            _sync(self.folder)
        self.layers_done = layers
        if old:
            for path in self._paths(old):
                path.unlink(missing_ok=True)

    def rows(self) -> list[torch.Tensor]:
        """Map the states of the last layer."""
        return [
            mapped(path, shape, self._dtype)
            for path, shape in zip(self._paths(self.layers_done), self._shapes, strict=True)
        ]

    def _kept(self) -> str:
        if self._temporary:
            return "Nothing is kept."
        return f"The hidden states after {self.layers_done} layers are kept: the same command goes on from there."

    def _path(self, text: int, layers: int | None) -> Path:
        return self.folder / f"text-{text}.{'next' if layers is None else layers}.states"

    def _paths(self, layers: int) -> list[Path]:
        return [self._path(text, layers) for text in range(len(self._shapes))]


def as_bytes(states: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    content: memoryview = states.contiguous().view(torch.uint8).numpy().data
    return content


def mapped(file: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Map the hidden states in a file."""
    return torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def _num_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def check_limit(needed: int, limit: int | None) -> None:
    """Refuse hidden states that take more bytes than the limit."""
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
