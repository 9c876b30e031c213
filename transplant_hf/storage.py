"""Folders and files on disk: written whole or not at all, and checked by their bytes."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import glob
import hashlib
import json
import mmap
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .errors import CheckpointError, ConfigurationError

__all__ = ["publish", "read_json", "sha256_of", "write_json"]

logger = logging.get_logger(__name__)

_STEP = 1 << 26
_ASIDE = ".old.tmp"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    if path.stat().st_size:
        # Large steps over a mapping: each gives up the interpreter once, so that hashing runs beside loading.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for start in range(0, len(view), _STEP):
                digest.update(view[start : start + _STEP])
    return digest.hexdigest()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        what: What it is, for the message.

    Raises:
        CheckpointError: Missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{what} is missing: {path}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{what} is not JSON: {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must hold a JSON object: {path} holds {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, readable and with a stable order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def publish(target: str | os.PathLike[str], replaces: Callable[[str], bool]) -> Iterator[Path]:
    """Write a folder whole or not at all.

    The block writes into a folder beside the target. When it ends well, the files of an existing target that the
    new artefact does not replace are carried over, and the two folders change places in one step.

    Args:
        target: The folder to make or to renew.
        replaces: Whether a file name belongs to the old artefact and must go.

    Yields:
        The folder to write into.

    Raises:
        ConfigurationError: The target is a file.
    """
    target = Path(target).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is a file; a folder to save into is needed.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    staging = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    staging.mkdir()
    try:
        yield staging
        _open_to_others(staging)
        if not target.exists():
            staging.rename(target)
            return
        _carry_over(target, staging, replaces)
        shutil.copymode(target, staging)
        _change_places(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what a killed process left beside the target, and put back what it had put aside."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = stale.name[len(target.name) + 2 :].partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if stale.name.endswith(_ASIDE) and not target.exists():
            stale.rename(target)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_to_others(folder: Path) -> None:
    """Give files the mode that `open` would: safetensors writes them for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod(0o777 & ~umask if path.is_dir() else 0o666 & ~umask)


def _carry_over(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    for path in old.iterdir():
        if (new / path.name).exists() or replaces(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, copy: str | Path) -> str | Path:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:  # no hard links here
        shutil.copy2(source, copy, follow_symlinks=False)
    return copy


def _change_places(new: Path, old: Path) -> None:
    """Exchange two folders in one step where the system can, else in two renames."""
    if Path.cwd().is_relative_to(old.resolve()) or old.is_mount() or old.is_symlink():
        _replace_files(new, old)
        return
    try:
        _exchange(new, old)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM):
            raise
        aside = new.with_suffix(_ASIDE)
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)


def _replace_files(new: Path, old: Path) -> None:
    """Renew a folder that cannot be exchanged: a working directory, a mount point or a link."""
    logger.warning(f"{old} is in use as a working directory, mount or link: its files are replaced one by one.")
    kept = {path.name for path in new.iterdir()}
    for path in new.iterdir():
        if path.is_dir():
            shutil.rmtree(old / path.name, ignore_errors=True)
        os.replace(path, old / path.name)
    for path in old.iterdir():
        if path.name not in kept and not path.is_dir():
            path.unlink()


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    name, args = {
        "linux": ("renameat2", (-100, os.fsencode(one), -100, os.fsencode(other), 2)),
        "darwin": ("renamex_np", (os.fsencode(one), os.fsencode(other), 2)),
    }.get(sys.platform, ("", ()))
    if not name or not hasattr(libc, name):
        raise OSError(errno.ENOSYS, "folders cannot be exchanged in one step here")
    if getattr(libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"exchange of {one} and {other} failed")
