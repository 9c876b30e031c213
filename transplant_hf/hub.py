"""Upload a folder as one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from .sources import hub_errors

__all__ = ["push_folder"]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    replaced: Callable[[Sequence[str]], set[str]] = lambda names: set(),
) -> CommitInfo:
    """Upload every file of a folder as one commit on top of the branch as it was found.

    Args:
        folder: A folder this process has just written.
        repo_id: The repository; made if it does not exist.
        commit_message: Its first line.
        token: As in huggingface_hub.
        private: The same.
        revision: The branch; made if it does not exist.
        create_pr: Open a pull request instead.
        replaced: Tells which of the repository's files belong to the old artefact, and go.

    Returns:
        The commit.

    Raises:
        HubError: Missing, gated, private or out of reach.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        names = [path.relative_to(folder).as_posix() for path in files]
        old = [sibling.rfilename for sibling in info.siblings or ()]
        gone = sorted(replaced(old) - set(names))
        operations = [CommitOperationDelete(name) for name in gone] + [
            CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)
        ]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
