"""Where a donor repo goes: into a folder, to the Hub, or both."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..hub import push_folder
from .companions import kept_in_repository
from .saved_files import replaced_among

__all__ = ["output_folder", "push_donor"]


@contextmanager
def output_folder(output: str | os.PathLike[str] | None, push_to: str | None) -> Iterator[Path]:
    """Yield the folder to write a donor repo into: `output`, else a temporary one named after the repository."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / (push_to or "donor").rpartition("/")[2]


def push_donor(folder: Path, repo_id: str, files: Collection[str], message: str, **kwargs: Any) -> CommitInfo:
    """Upload a donor repo as one commit."""
    kept = functools.partial(kept_in_repository, folder)
    return push_folder(
        folder, repo_id, commit_message=message, replaced=replaced_among, kept=kept, only=set(files), **kwargs
    )
