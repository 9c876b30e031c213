"""Which files go to large-file storage, and which are ignored: `.gitattributes` and `.gitignore`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

__all__ = ["DEFAULT_GITATTRIBUTES", "is_ignored", "is_lfs_path", "lfs_patterns"]

_LFS_SUFFIXES = ("bin", "ckpt", "gguf", "h5", "msgpack", "npz", "onnx", "pt", "pth", "safetensors", "zip")

# What the Hub commits first into every new repository.
DEFAULT_GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES
).encode()


def lfs_patterns(gitattributes: bytes) -> list[str]:
    """Patterns that a `.gitattributes` sends to large-file storage."""
    lines = (line.split() for line in gitattributes.decode("utf-8", errors="replace").splitlines())
    return [words[0] for words in lines if len(words) > 1 and "filter=lfs" in words[1:]]


def is_lfs_path(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches; a pattern without a slash is about the file name alone."""
    name = PurePosixPath(path).name
    return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether a `.gitignore` leaves a path out. Plain patterns only: negation (`!`) is not understood."""
    parts = PurePosixPath(path).parts
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for line in gitignore.splitlines():
        pattern = line.strip().rstrip("/")
        if not pattern or pattern.startswith(("#", "!")):
            continue
        if "/" in pattern:
            anchored = pattern.lstrip("/")
            if any(fnmatchcase(prefix, anchored) for prefix in prefixes):
                return True
        elif any(fnmatchcase(part, pattern) for part in parts):
            return True
    return False
