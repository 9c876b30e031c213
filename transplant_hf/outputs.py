"""Where commands may write: a new or an empty place, or, when asked for, over what transplant_hf wrote there before."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from .errors import ConfigurationError

__all__ = ["check_output_file", "check_output_folder", "some_of"]

_SHOWN = 3


def check_output_folder(
    folder: str | os.PathLike[str],
    overwrite: bool,
    strangers: Callable[[Path], Collection[str]] = lambda folder: (),
) -> None:
    """Refuse a folder that holds anything, before any work is done for what would be written there.

    Args:
        folder: The folder to write.
        overwrite: Whether what transplant_hf wrote there may be replaced. Other files stay.
        strangers: Returns the names in a folder that the new files would replace, and that transplant_hf did not write.

    Raises:
        ConfigurationError: It is a file, not empty, or not writable.
    """
    place = Path(folder).expanduser()
    if place.exists() and not place.is_dir():
        raise ConfigurationError(f"{folder} is a file; a folder to write into is needed.")
    _refuse_not_writable(place)
    held = [path.name for path in place.iterdir()] if place.is_dir() else []
    if held and not overwrite:
        raise ConfigurationError(
            f"{folder} is not empty: it holds {some_of(held)}. Choose another folder, or pass overwrite=True "
            "(--overwrite), which replaces what transplant_hf wrote there and keeps other files."
        )
    foreign = sorted(strangers(place)) if held else []
    if foreign:
        raise ConfigurationError(
            f"{folder} holds {some_of(foreign)}, which transplant_hf has no record of writing and which would be lost. "
            "Overwriting replaces only what it wrote. Choose another folder, or move these files away."
        )


def check_output_file(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a file that exists already, before any work is done for what would be written there.

    Args:
        path: The file to write.
        overwrite: Whether it may be replaced.

    Raises:
        ConfigurationError: It exists, or cannot be written.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise ConfigurationError(f"{path} is a folder; the name of a file to write is needed.")
    if place.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists. Choose another name, or pass overwrite=True (--overwrite).")
    _refuse_not_writable(place)


def some_of(names: Collection[str]) -> str:
    """Return the first few names for a message."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _refuse_not_writable(place: Path) -> None:
    nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not (nearest.is_dir() or nearest == place):
        raise ConfigurationError(f"{place} cannot be written: {nearest} is a file. Choose another place.")
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise ConfigurationError(
            f"{place} cannot be written: {nearest} is read-only, or permission is denied. Choose another place, or "
            "change who may write there."
        )
