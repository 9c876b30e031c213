"""Contents by sha256, in one folder on disk."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Blob", "BlobStore", "git_hash"]

_CHUNK = 1 << 20


def git_hash(kind: str, content: bytes) -> str:
    """The id that git gives to an object."""
    header = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One content: its two names, its size and where its bytes lie."""

    sha256: str
    git_oid: str
    size: int
    path: Path

    def read(self) -> bytes:
        """All bytes."""
        return self.path.read_bytes()


class BlobStore:
    """Keeps every content once.

    Contents live on disk, not in memory, so that a test with weights of some size does not hold them twice.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._blobs: dict[str, Blob] = {}
        self._lock = threading.Lock()
        self._serial = 0

    def get(self, sha256: str) -> Blob | None:
        """The content of that name, if it is here."""
        with self._lock:
            return self._blobs.get(sha256)

    def add_bytes(self, content: bytes) -> Blob:
        """Keep a content that is in memory."""
        return self.add_file(self.receive([content])[0], move=True)

    def add_file(self, source: Path, *, move: bool = False) -> Blob:
        """Keep the content of a file; `move` takes the file itself."""
        sha256, git_oid, size = _hash_file(source)
        with self._lock:
            known = self._blobs.get(sha256)
            if known is not None:
                if move:
                    source.unlink()
                return known
            target = self.root / sha256
            if move:
                source.replace(target)
            else:
                shutil.copyfile(source, target)
            blob = Blob(sha256, git_oid, size, target.absolute())
            self._blobs[sha256] = blob
            return blob

    def receive(self, chunks: Iterable[bytes]) -> tuple[Path, str]:
        """Write a body that arrives in pieces to a temporary file; returns the file and its sha256."""
        with self._lock:
            self._serial += 1
            target = self._incoming / str(self._serial)
        sha256 = hashlib.sha256()
        with target.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                sha256.update(chunk)
        return target, sha256.hexdigest()


def _hash_file(path: Path) -> tuple[str, str, int]:
    size = path.stat().st_size
    sha256, git_oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            git_oid.update(chunk)
    return sha256.hexdigest(), git_oid.hexdigest(), size
