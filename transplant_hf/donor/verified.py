"""Files whose sha256 was compared already, so that no file is hashed more often than needed.

A process remembers the files that it hashed. For files in the cache of the Hub client, a stamp beside the file lets
other processes know. It holds what the file was like when it was hashed; a file that was changed since is hashed again.
No stamp is read or written outside that cache, where others could have put both the file and the stamp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path

from huggingface_hub import constants

from ..storage import sha256_of

__all__ = ["verified_sha256"]

_SUFFIX = ".verified"


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
    known = _hashed.get(path) or (_read(stamp) if stamp is not None else None)
    if known is not None and known[0] == state:
        return known[1]
    sha256 = sha256_of(path)
    if _FileState.of(path) == state:  # else it was changed meanwhile
        _hashed[path] = (state, sha256)
        if stamp is not None:
            _write(stamp, state, sha256)
    return sha256


def _stamp_of(path: Path) -> Path | None:
    """The stamp of a file of the cache: beside the blob that a snapshot links to."""
    cache, blob = Path(constants.HF_HUB_CACHE).resolve(), path.resolve()
    inside = blob.relative_to(cache).parts if path.is_symlink() and blob.is_relative_to(cache) else ()
    is_blob = len(inside) == 3 and "--" in inside[0] and inside[1] == "blobs"
    return blob.with_name(blob.name + _SUFFIX) if is_blob else None


def _read(stamp: Path) -> tuple[_FileState, str] | None:
    try:
        fields = json.loads(stamp.read_text("utf-8"))
        return _FileState(**{name: int(value) for name, value in fields["file"].items()}), str(fields["sha256"])
    except (OSError, AttributeError, KeyError, TypeError, ValueError):  # none, or not a whole one
        return None


def _write(stamp: Path, state: _FileState, sha256: str) -> None:
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
