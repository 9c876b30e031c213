"""Repositories: commits with real git ids, branches, tags, pull requests and large-file objects."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import PurePosixPath

from .blobs import Blob, git_hash
from .errors import ApiError, revision_not_found

__all__ = ["Commit", "FileEntry", "Repo", "RepoStore", "folder_ids", "iso_date"]

_SHORT_SHA = re.compile(r"[0-9a-f]{7,39}")
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"


@dataclass(frozen=True)
class FileEntry:
    """A file of a commit: its content, and whether git itself holds only a pointer to it."""

    blob: Blob
    lfs: bool

    @property
    def pointer(self) -> bytes:
        """What git holds for a large file."""
        return _POINTER.format(sha256=self.blob.sha256, size=self.blob.size).encode()

    @property
    def oid(self) -> str:
        """Git's id of the file: of the pointer, when the file is large."""
        return git_hash("blob", self.pointer) if self.lfs else self.blob.git_oid

    @property
    def etag(self) -> str:
        """The name under which clients cache the content."""
        return self.blob.sha256 if self.lfs else self.blob.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of all files, and where it came from."""

    id: str
    parent: str | None
    files: Mapping[str, FileEntry]
    title: str
    description: str
    author: str
    time: int


def _git_order(row: tuple[str, tuple[str, str]]) -> str:
    # git sorts a folder as if its name ended with a slash.
    name, (mode, _) = row
    return f"{name}/" if mode == "40000" else name


def iso_date(timestamp: int) -> str:
    """A time as the Hub writes it."""
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def folder_ids(files: Mapping[str, FileEntry]) -> dict[str, str]:
    """Git's tree id of every folder; the root is the empty string."""
    children: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, entry in files.items():
        pure = PurePosixPath(path)
        for parent in pure.parents:
            children.setdefault(_folder_name(parent), {})
        children[_folder_name(pure.parent)][pure.name] = ("100644", entry.oid)
    ids: dict[str, str] = {}
    # Deepest first: the id of a folder is made from the ids of what it holds.
    for folder in sorted(children, key=lambda name: name.count("/") + bool(name), reverse=True):
        rows = sorted(children[folder].items(), key=_git_order)
        content = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in rows)
        ids[folder] = git_hash("tree", content)
        if folder:
            above, _, name = folder.rpartition("/")
            children[above][name] = ("40000", ids[folder])
    return ids


def _folder_name(folder: PurePosixPath) -> str:
    return "" if folder == PurePosixPath() else folder.as_posix()


@dataclass
class Repo:
    """One model repository."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    # Objects uploaded to this repository. Another one has to send the bytes again, as on the public Hub.
    lfs_objects: set[str] = field(default_factory=set)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def namespace(self) -> str:
        """The user or organization it belongs to."""
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """Find the commit that a branch, tag, pull request, commit id or its beginning stands for.

        Raises:
            ApiError: There is none.
        """
        for refs, prefix in ((self.branches, "refs/heads/"), (self.tags, "refs/tags/"), (self.pulls, "")):
            for name in (revision, revision.removeprefix(prefix)):
                if name in refs:
                    return self.commits[refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        if _SHORT_SHA.fullmatch(revision):
            found = [commit for sha, commit in self.commits.items() if sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise revision_not_found(revision)

    def movable(self, revision: str) -> dict[str, str]:
        """The refs that a commit to this revision moves: branches or pull requests.

        Raises:
            ApiError: The revision is not a branch or pull request.
        """
        for refs in (self.branches, self.pulls):
            if revision in refs:
                return refs
        raise revision_not_found(revision)

    def history(self, commit: Commit) -> Iterator[Commit]:
        """A commit and those before it, newest first."""
        current: Commit | None = commit
        while current is not None:
            yield current
            current = self.commits[current.parent] if current.parent else None


class RepoStore:
    """All repositories. Hold `lock` while changing one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._repos: dict[str, Repo] = {}
        self._clock = 0

    def get(self, repo_id: str) -> Repo | None:
        """A repository, if there is one of that name."""
        return self._repos.get(repo_id)

    def clear(self) -> None:
        """Forget all repositories."""
        with self.lock:
            self._repos.clear()

    def create(self, repo_id: str, *, private: bool = False, gated: str | bool = False) -> Repo:
        """Create an empty repository.

        Raises:
            ApiError: It exists.
        """
        with self.lock:
            if repo_id in self._repos:
                raise ApiError(409, "You already created this model repo")
            self._repos[repo_id] = Repo(repo_id, private=private, gated="auto" if gated is True else gated)
            return self._repos[repo_id]

    def delete(self, repo_id: str) -> None:
        """Remove a repository."""
        with self.lock:
            self._repos.pop(repo_id, None)

    def commit(
        self,
        repo: Repo,
        files: Mapping[str, FileEntry],
        *,
        parent: Commit | None,
        title: str,
        description: str = "",
        author: str,
    ) -> Commit:
        """Record a new state of a repository; no ref is moved."""
        with self.lock:
            # A strictly increasing clock keeps ids apart when the same files are committed twice in a second.
            self._clock = max(self._clock + 1, int(time.time()))
            who = f"{author} <{author}@users.noreply.invalid> {self._clock} +0000"
            lines = [f"tree {folder_ids(files)['']}", f"author {who}", f"committer {who}", "", title]
            if parent is not None:
                lines.insert(1, f"parent {parent.id}")
            if description:
                lines += ["", description]
            sha = git_hash("commit", ("\n".join(lines) + "\n").encode())
            parent_id = parent.id if parent is not None else None
            commit = Commit(sha, parent_id, dict(files), title, description, author, self._clock)
            repo.commits[sha] = commit
            repo.lfs_objects.update(entry.blob.sha256 for entry in files.values() if entry.lfs)
            return commit
