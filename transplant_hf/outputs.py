"""Where commands may write: a new or empty place or, with `overwrite`, over what transplant_hf wrote there before."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from .errors import ConfigurationError

__all__ = ["check_output_file", "check_output_folder", "some_of"]

_MAX_NAMES = 3


def check_output_folder(
    folder: str | os.PathLike[str],
    overwrite: bool,
    unrecorded: Callable[[Path], Collection[str]] = lambda folder: (),
) -> None:
    """Refuse a folder that is not empty, before any work is done."""
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"{folder} is a file; choose a folder to write into.")
    _check_writable(path)
    names = [inner.name for inner in path.iterdir()] if path.is_dir() else []
    if names and not overwrite:
        raise ConfigurationError(
            f"{folder} is not empty: it holds {some_of(names)}. Choose another folder, or pass overwrite=True "
            "(--overwrite), which replaces what transplant_hf wrote there and keeps other files."
        )
    foreign = sorted(unrecorded(path)) if names else []
    if foreign:
        raise ConfigurationError(
            f"{folder} holds {some_of(foreign)}, which transplant_hf has no record of writing and which would be lost. "
            "Choose another folder, or move these files away."
        )


def check_output_file(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a file that exists, before any work is done."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigurationError(f"{path} is a folder; name a file to write.")
    if file.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists. Choose another name, or pass overwrite=True (--overwrite).")
    _check_writable(file)


def some_of(names: Collection[str]) -> str:
    """Return the first few names for a message."""
    listed = ", ".join(sorted(names)[:_MAX_NAMES])
    return listed if len(names) <= _MAX_NAMES else f"{listed} and {len(names) - _MAX_NAMES} more"


def _check_writable(path: Path) -> None:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (nearest.is_dir() or nearest == path):
        raise ConfigurationError(f"cannot write {path}: {nearest} is a file. Choose another place.")
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise ConfigurationError(
            f"cannot write {path}: {nearest} is read-only, or permission is denied. Choose another place, or change "
            "who may write there."
        )
