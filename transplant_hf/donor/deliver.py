"""Where a donor repo goes: into a folder, to the Hub, or both."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import CommitInfo

from ..hub import push_folder
from .companions import kept_in_repository
from .saved_files import replaced_among

__all__ = ["deliver"]


def deliver(
    write: Callable[[Path], Collection[str]],
    output: str | os.PathLike[str] | None,
    push_to: str | None,
    name: str | None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> tuple[str | None, str | None]:
    """Write a donor repo, and upload what was written where that is asked for.

    Args:
        write: Writes it into a folder, and returns its files, by their paths there.
        output: The folder; one that is gone afterwards by default.
        push_to: The repository to upload to, as one commit.
        name: What the donor is called, if it is known; else it is called after the folder.
        token: As in huggingface_hub.
        private: The same.
        revision: The branch to push to.

    Returns:
        The folder, if it stays, and where the commit is.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(output) if output is not None else Path(scratch) / (push_to or "donor").rpartition("/")[2]
        names = write(target)
        if push_to is None:
            return str(target), None
        commit: CommitInfo = push_folder(
            target,
            push_to,
            commit_message=f"Upload donor {name or target.name}",
            token=token,
            private=private,
            revision=revision,
            replaced=replaced_among,
            kept=functools.partial(kept_in_repository, target),
            only=set(names),  # the folder may hold other files of the user's
        )
        return str(target) if output is not None else None, str(commit.commit_url)
