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
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safetensors import SafetensorError
from transformers.utils import logging

from .errors import CheckpointError, ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["fill", "publish", "read_json", "sha256_of", "write_json", "writing"]

logger = logging.get_logger(__name__)

_STEP = 1 << 26
_ASIDE = ".old.tmp"
_ELSEWHERE = "Choose another folder, or change who may write here"
# What a disk can refuse: how it is said, and what helps.
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or choose another folder"),
    errno.EFBIG: ("a file is larger than this disk or process may write", "Save smaller files with max_shard_size="),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EACCES: ("permission is denied", _ELSEWHERE),
}


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


def fill(file: BinaryIO, view: memoryview) -> bool:
    """Read from an unbuffered file until a piece of memory is full; `False` when the file ends before."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True


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
    except (OSError, ValueError, RecursionError) as error:  # also numbers without end, nests without floor
        raise CheckpointError(f"{what} is not JSON that can be read: {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must hold a JSON object: {path} holds {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, readable and with a stable order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def writing(what: str | os.PathLike[str], kept: str = "Nothing was left behind.") -> Iterator[None]:
    """Turn what a disk refuses into one sentence that says what to do; the original is the `__cause__`.

    Args:
        what: What is being written.
        kept: What became of it, for the message.

    Raises:
        CheckpointError: The disk is full or may not be written to.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else None
        elsewhere = named is not None and not Path(named).absolute().is_relative_to(Path(what).absolute().parent)
        if error.errno not in _REFUSALS or (error.errno == errno.EACCES and elsewhere):
            raise  # among them: something that is read for the writing
        _refused(what, error.errno, kept, error)
    except SafetensorError as error:
        # It has no number of its own, only that of the system in its text.
        found = re.search(r"os error (\d+)", str(error))
        if found is None or int(found[1]) not in _REFUSALS:
            raise
        _refused(what, int(found[1]), kept, error)


def _refused(what: str | os.PathLike[str], code: int, kept: str, error: Exception) -> NoReturn:
    reason, advice = _REFUSALS[code]
    raise CheckpointError(
        f"{os.fspath(what)} could not be written: {reason} ({error}). {kept} {advice}, and try again."
    ) from error


@contextmanager
def publish(target: str | os.PathLike[str], replaces: Callable[[str], bool]) -> Iterator[Path]:
    """Write a folder whole or not at all.

    The block writes into a folder beside the target. When it ends well, the files of an existing target that the
    new artefact does not replace are carried over, those in its subfolders too, and the two folders change places in
    one step. Of several processes that do so at once, the last one's artefact stays.

    Args:
        target: The folder to make or to renew.
        replaces: Whether a file belongs to the old artefact and must go, by its path in the target, `/` between parts.

    Yields:
        The folder to write into.

    Raises:
        ConfigurationError: The target is a file.
        CheckpointError: The disk is full or may not be written to; the target is as it was.
    """
    target = Path(target).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()  # the link stays, the folder it leads to is renewed
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is a file; a folder to save into is needed.")
    kept = "What was there before is unchanged." if target.exists() else "Nothing was left behind."
    with writing(target, kept):
        # What is mounted cannot change places with a folder outside, nor can files be renamed into it.
        place = target if target.is_mount() else target.parent
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            _sweep(target, place)
        staging = place / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        staging.mkdir()
        try:
            with _locked(staging):
                yield staging
                _open_to_others(staging)
                with _alone(place):
                    _take_place(staging, target, replaces)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, target: Path, replaces: Callable[[str], bool]) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if target.is_mount() or Path.cwd().is_relative_to(target.resolve()):
        logger.warning(f"{target} is in use as a working directory or mount: its files are replaced one by one.")
        gone = staging / ".gone"
        gone.mkdir()
        _replace_files(staging, target, gone, replaces)
        return
    _carry_over(target, staging, replaces)
    shutil.copymode(target, staging)
    _change_places(staging, target)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Let one process at a time change what a folder holds, for a moment."""
    with _locked(place, wait=True):
        yield


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process, whatever ends it.

    Yields:
        Whether it is held; also true where the system knows no such locks.
    """
    if sys.platform == "win32":
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # some network disks know no locks
            held = error.errno not in (errno.EAGAIN, errno.EACCES)
        yield held
    finally:
        os.close(handle)


def _sweep(target: Path, place: Path) -> None:
    """Remove what a killed process left beside the target, and put back what it had put aside."""
    for stale in place.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = stale.name[len(target.name) + 2 :].partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        with _locked(stale) as left_behind:
            # Held by a process that this one cannot see: in another container.
            if not left_behind:
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
    # Asked by making one: the umask itself can only be read by changing it, for the whole process.
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    probe.touch()
    file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (probe, folder))
    probe.unlink()
    for path in folder.rglob("*"):
        path.chmod(folder_mode if path.is_dir() else file_mode)


def _carry_over(old: Path, new: Path, replaces: Callable[[str], bool], within: str = "") -> None:
    for path in old.iterdir():
        copy, name = new / path.name, f"{within}{path.name}"
        if not _is_folder(path):
            if not copy.exists() and not replaces(name):
                _link(path, copy)
        elif not copy.exists():
            copy.mkdir()
            _carry_over(path, copy, replaces, f"{name}/")
            shutil.copystat(path, copy)
            if not any(copy.iterdir()) and any(path.iterdir()):
                copy.rmdir()
        elif copy.is_dir():
            _carry_over(path, copy, replaces, f"{name}/")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:  # no hard links here
        shutil.copy2(source, copy, follow_symlinks=False)


def _change_places(new: Path, old: Path) -> None:
    """Exchange two folders in one step where the system can, else in two renames."""
    try:
        _exchange(new, old)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM):
            raise
        aside = new.with_suffix(_ASIDE)
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)


def _replace_files(new: Path, old: Path, gone: Path, replaces: Callable[[str], bool], within: str = "") -> None:
    """Renew a folder that cannot be exchanged: a working directory or a mount point."""
    for path in old.iterdir():
        own, name = new / path.name, f"{within}{path.name}"
        if path == new:  # it lies in what is mounted
            continue
        if _is_folder(path) and (own.is_dir() or not own.exists()):
            _replace_files(own, path, gone, replaces, f"{name}/")
        elif path.is_dir() or own.is_dir() if own.exists() else replaces(name):
            (gone / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(gone / name)
    for path in new.iterdir() if new.exists() else ():
        if path != gone and not (path.is_dir() and _is_folder(old / path.name)):  # such a folder is done
            path.replace(old / path.name)


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
