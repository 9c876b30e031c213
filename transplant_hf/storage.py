"""Folders and files on disk: published whole or not at all, checked by their bytes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError
from transformers.utils import logging

from .display import some_of
from .errors import CheckpointError, ConfigurationError

if sys.platform != "win32":
    import fcntl

logger = logging.get_logger(__name__)

_HASH_STEP = 1 << 26
_ASIDE = ".old.tmp"
_STAGING = re.compile(r"\.[0-9a-f]{8}(\.old)?\.tmp$")
_CHANGE_FOLDER = "Choose another folder, or change who may write here"
# What a disk can refuse: the reason, and what helps.
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or choose another folder"),
    errno.EFBIG: (
        "a file is larger than this disk or process may write",
        "Save smaller files with max_shard_size= (--max-shard-size)",
    ),
    errno.EROFS: ("the disk is read-only", _CHANGE_FOLDER),
    errno.EACCES: ("permission is denied", _CHANGE_FOLDER),
}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    if path.stat().st_size:
        # Large steps over a mapping: each releases the interpreter once, so that hashing runs beside loading.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for start in range(0, len(view), _HASH_STEP):
                digest.update(view[start : start + _HASH_STEP])
    return digest.hexdigest()


# A process remembers the files that it hashed. For files in the cache of the Hub client, a stamp beside the file lets
# other processes know what the file was like when it was hashed. No stamp is read or written outside that cache, where
# others could have put both the file and the stamp.
_STAMP = ".verified"


@dataclasses.dataclass(frozen=True)
class _FileState:
    """What changes when a file is changed or replaced."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _FileState:
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


_hashed: dict[Path, tuple[_FileState, str]] = {}


def verified_sha256(path: Path) -> str:
    """Return the sha256 of a file, which is hashed only if that is not known of the file as it is."""
    state, stamp = _FileState.of(path), _stamp_of(path)
    known = _hashed.get(path) or (_read_stamp(stamp) if stamp is not None else None)
    if known is not None and known[0] == state:
        return known[1]
    sha256 = sha256_of(path)
    if _FileState.of(path) == state:  # else it was changed meanwhile
        _hashed[path] = (state, sha256)
        if stamp is not None:
            _write_stamp(stamp, state, sha256)
    return sha256


def _stamp_of(path: Path) -> Path | None:
    """The stamp of a file of the cache: beside the blob that a snapshot links to."""
    cache, blob = Path(constants.HF_HUB_CACHE).resolve(), path.resolve()
    inside = blob.relative_to(cache).parts if path.is_symlink() and blob.is_relative_to(cache) else ()
    is_blob = len(inside) == 3 and "--" in inside[0] and inside[1] == "blobs"
    return blob.with_name(blob.name + _STAMP) if is_blob else None


def _read_stamp(stamp: Path) -> tuple[_FileState, str] | None:
    try:
        fields = json.loads(stamp.read_text("utf-8"))
        return _FileState(**{name: int(value) for name, value in fields["file"].items()}), str(fields["sha256"])
    except (OSError, AttributeError, KeyError, TypeError, ValueError):  # none, or not a whole one
        return None


def _write_stamp(stamp: Path, state: _FileState, sha256: str) -> None:
    """Write a stamp in one step; without a stamp, the next process hashes the file again."""
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=stamp.parent, prefix=stamp.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"sha256": sha256, "file": dataclasses.asdict(state)}, file)
            os.replace(temporary, stamp)
        except OSError:
            os.unlink(temporary)
            raise


def files_in(folder: Path) -> set[str]:
    """Return the paths, relative to a folder, of all files and links in it, `/` between the parts."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path)}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{what} is missing: {path}") from error
    except (OSError, ValueError, RecursionError) as error:  # also numbers of many digits, and deep nesting
        raise CheckpointError(f"{what} cannot be read as JSON: {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must hold a JSON object: {path} holds {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, with a stable order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def writing(what: str | os.PathLike[str], kept: str = "Nothing was left behind.") -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do; the original error is the `__cause__`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The system's error number; safetensors has it in its message alone.
        found = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        file = getattr(error, "filename", None)
        # A file that is read, not written, may be what permission is denied for.
        elsewhere = isinstance(file, str) and not Path(file).absolute().is_relative_to(Path(what).absolute().parent)
        if code not in _DISK_ERRORS or (code == errno.EACCES and elsewhere):
            raise
        reason, advice = _DISK_ERRORS[code]
        raise CheckpointError(
            f"cannot write {os.fspath(what)}: {reason} ({error}). {kept} {advice}, and try again."
        ) from error


@contextmanager
def publish(target: str | os.PathLike[str], replaced: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """Write a folder whole or not at all.

    The block writes into a folder beside the target. After it, the files of an existing target that are not replaced
    are linked into the new folder, and the two folders are exchanged in one step. If several processes publish to one
    target, the last one's files stay.
    """
    target = Path(target).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()  # the link stays, its folder is updated
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is a file; choose a folder to save into.")
    if target.exists():
        replaced(target)  # malformed records are found before the work is done
    # A mount point cannot be exchanged with a folder outside it, nor can files be renamed into it.
    place = target if target.is_mount() else target.parent
    with _staging_beside(target, place) as staging:
        yield staging
        _set_usual_modes(staging)
        with locked(place):
            _put_in_place(staging, target, replaced)


@contextmanager
def publish_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: the block writes to the path that it gets, which then replaces the target."""
    target = Path(target).expanduser().resolve()  # a link stays, its file is replaced
    with _staging_beside(target, target.parent) as staging:
        yield staging / target.name
        _set_usual_modes(staging)
        os.replace(staging / target.name, target)


@contextmanager
def _staging_beside(target: Path, place: Path) -> Iterator[Path]:
    """Make a folder that is removed after the block, with whatever the block left in it."""
    kept = "What was there before is unchanged." if target.exists() else "Nothing was left behind."
    with writing(target, kept):
        place.mkdir(parents=True, exist_ok=True)
        staging = place / f".{target.name}.{secrets.token_hex(4)}.tmp"
        with locked(place):
            _remove_abandoned(target, place)
            staging.mkdir()
            lock = _lock(staging)
        try:
            yield staging
        finally:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path, replaced: Callable[[Path], Collection[str]]) -> None:
    if not target.exists():
        staging.rename(target)
        return
    gone = set(replaced(target))
    if target.is_mount() or Path.cwd().is_relative_to(target.resolve()):
        logger.warning(f"{target} is a working directory or mount point: its files are replaced one by one.")
        _replace_files(staging, target, gone)
        return
    _carry_over(target, staging, gone)
    shutil.copymode(target, staging)
    try:
        _exchange(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM):
            raise
        aside = staging.with_suffix(_ASIDE)
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _carry_over(old: Path, new: Path, gone: Collection[str]) -> None:
    """Link the files of an old folder that stay into a new one."""
    paths = sorted(old.rglob("*"))
    for path in paths:
        name = path.relative_to(old).as_posix()
        copy = new / name
        if _is_folder(path):
            if not any(path.iterdir()):
                copy.mkdir(parents=True, exist_ok=True)
        elif name not in gone and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy, follow_symlinks=False)
            except OSError:  # a disk without hard links
                shutil.copy2(path, copy, follow_symlinks=False)
    for path in filter(_is_folder, paths):
        if _is_folder(copy := new / path.relative_to(old)):
            shutil.copymode(path, copy)


def _replace_files(new: Path, old: Path, gone: Collection[str]) -> None:
    """Update a folder that cannot be exchanged: a working directory or a mount point."""
    names = files_in(new)
    for name in sorted(names):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(old / name)
    for name in set(gone) - names:
        if not (old / name).is_relative_to(new):  # the staging folder is inside a mount point
            (old / name).unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders in one step. Only system calls can, which Python has no functions for."""
    name, args = {
        "linux": ("renameat2", (-100, os.fsencode(one), -100, os.fsencode(other), 2)),
        "darwin": ("renamex_np", (os.fsencode(one), os.fsencode(other), 2)),
    }.get(sys.platform, ("", ()))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        raise OSError(errno.ENOSYS, "folders cannot be exchanged in one step here")
    if call(*args) != 0:
        raise OSError(ctypes.get_errno(), f"exchange of {one} and {other} failed")


def _lock(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder until its handle is closed or the process ends; `None` if another process has it, or no locks."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # it has just been removed
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a network disk without locks
        os.close(handle)
        return None
    return handle


@contextmanager
def locked(folder: Path, say_waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one process at a time change which files a folder holds."""
    handle = _lock(folder)
    if handle is None:
        if say_waiting is not None and folder.is_dir() and sys.platform != "win32":
            say_waiting()
        handle = _lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _remove_abandoned(target: Path, place: Path) -> None:
    """Remove what a killed process left beside the target, and put back what it had moved aside."""
    for abandoned in place.glob(f".{glob.escape(target.name)}.*.tmp"):
        if not _STAGING.search(abandoned.name) or (lock := _lock(abandoned)) is None:  # not ours, or in use
            continue
        if abandoned.name.endswith(_ASIDE) and not target.exists():
            abandoned.rename(target)
        else:
            shutil.rmtree(abandoned, ignore_errors=True)
        os.close(lock)


def _set_usual_modes(folder: Path) -> None:
    """Give files the mode that `open` would: safetensors writes them for the owner alone."""
    # The umask can only be read by changing it for the whole process, so a new file shows it.
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    probe.touch()
    file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (probe, folder))
    probe.unlink()
    for path in folder.rglob("*"):
        path.chmod(folder_mode if path.is_dir() else file_mode)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


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


def _check_writable(path: Path) -> None:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (nearest.is_dir() or nearest == path):
        raise ConfigurationError(f"cannot write {path}: {nearest} is a file. Choose another place.")
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise ConfigurationError(
            f"cannot write {path}: {nearest} is read-only, or permission is denied. Choose another place, or change "
            "who may write there."
        )
