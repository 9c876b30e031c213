"""The test Hub as tests use it: start it, fill it, break it, and see what it was asked."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from .dispatch import Dispatcher
from .faults import Fault
from .requestlog import RequestLog
from .state import MIB, HubState
from .store import Commit, FileEntry, Repo
from .users import UserDirectory
from .wire import Origin

__all__ = ["HubServer"]

Files = Mapping[str, bytes | Path] | Path


class HubServer:
    """A Hub on two loopback ports: one for the site and its API, one for the contents of large files.

    Args:
        lfs_threshold: From this size on, a file is large; names that `.gitattributes` lists are large at any
            size.
    """

    def __init__(self, lfs_threshold: int = 10 * MIB) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="test-hub-"))
        self.state = HubState(self._root, lfs_threshold)
        self._dispatcher = Dispatcher(self.state)
        self._hub = Origin("hub", self._dispatcher)
        self._cdn = Origin("cdn", self._dispatcher)
        self.state.hub_url, self.state.cdn_url = self._hub.url, self._cdn.url
        self._running = False

    # -- Running ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` has to be; still known after the server stopped."""
        return self.state.hub_url

    @property
    def crashes(self) -> list[str]:
        """Tracebacks of endpoints that failed: mistakes of the server, not of its client."""
        return self._hub.crashes + self._cdn.crashes

    def start(self) -> HubServer:
        """Begin to answer."""
        self._hub.start()
        self._cdn.start()
        self._running = True
        return self

    def stop(self) -> None:
        """Stop answering, for good, and delete all contents. Does nothing the second time."""
        if self._running:
            self._running = False
            self._hub.stop()
            self._cdn.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def reset(self) -> None:
        """Forget repositories, added users, faults and requests; sizes and addresses stay."""
        self.state.store.clear()
        self.state.users = UserDirectory()
        self._dispatcher.faults.clear()
        self._dispatcher.log.clear()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- Filling ---------------------------------------------------------------------------------------------

    def add_repo(
        self,
        repo_id: str,
        files: Files | None = None,
        *,
        private: bool = False,
        gated: bool | str = False,
        message: str = "initial commit",
    ) -> str:
        """Create a repository with one commit, without any request.

        Nothing is added to the files; a repository that a client creates starts with a `.gitattributes`.

        Args:
            repo_id: Its id; the part before the slash is its owner.
            files: Path in the repository -> content or file; or a folder, to take all files below it.
            private: Only the owner and users that `grant` let in may know of it.
            gated: Only the owner and users that `grant` let in may read its files.
            message: Message of the commit.

        Returns:
            The id of the commit.
        """
        with self.state.store.lock:
            repo = self.state.store.create(repo_id, private=private, gated=gated)
            return self._commit(repo, files, (), None, "main", message)

    def commit(
        self,
        repo_id: str,
        files: Files | None = None,
        *,
        delete: Iterable[str] = (),
        branch: str = "main",
        message: str = "update",
    ) -> str:
        """Add a commit to a branch, without any request.

        Returns:
            The id of the commit.
        """
        with self.state.store.lock:
            repo = self._repo(repo_id)
            head = repo.commits[repo.movable(branch)[branch]]
            return self._commit(repo, files, delete, head, branch, message)

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        """Create a tag, or move it."""
        repo = self._repo(repo_id)
        repo.tags[name] = repo.resolve(revision).id

    def grant(self, repo_id: str, user: str) -> None:
        """Let a user into a private or gated repository."""
        self._repo(repo_id).granted.add(user)

    # -- Looking ---------------------------------------------------------------------------------------------

    @property
    def requests(self) -> RequestLog:
        """What the server was asked."""
        return self._dispatcher.log

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The id of the commit that a revision stands for."""
        return self._repo(repo_id).resolve(revision).id

    def paths(self, repo_id: str, revision: str = "main") -> list[str]:
        """Paths of all files of a revision."""
        return sorted(self._repo(repo_id).resolve(revision).files)

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        return self._repo(repo_id).resolve(revision).files[path].blob.read()

    def is_lfs(self, repo_id: str, path: str, revision: str = "main") -> bool:
        """Whether a file lies in large-file storage."""
        return self._repo(repo_id).resolve(revision).files[path].lfs

    def exists(self, repo_id: str) -> bool:
        """Whether there is a repository of that name."""
        return self.state.store.get(repo_id) is not None

    # -- Breaking --------------------------------------------------------------------------------------------

    def fail(
        self,
        method: str,
        path_pattern: str,
        *,
        status: int | None = None,
        message: str = "Injected fault",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        times: int | None = 1,
        after: int = 0,
        drop_connection: bool | Literal["before", "after"] = False,
        truncate_to: int | None = None,
        wrong_bytes: bool = False,
        delay: float = 0.0,
    ) -> Fault:
        """Make the next requests of a kind fail; see `Fault` for what can go wrong.

        Contents are asked for under several paths: `/user/name/resolve/main/file`, then
        `/api/resolve-cache/models/user/name/<commit>/file` for a small file or
        `/blobs/<sha256>/user/name/file` for a large one. A pattern such as `/blobs/*/model.safetensors` meets
        only the last step.

        What the client makes of it: it waits one second longer than `Retry-After` says; a cut download goes
        on from the last full 10 MiB, so that of a small file starts anew; wrong bytes of the right size are
        not noticed.

        Returns:
            The fault, whose `hits` counts the requests that ran into it.
        """
        fault = Fault(
            method=method.upper(),
            path_pattern=path_pattern,
            status=status,
            message=message,
            code=code,
            headers=dict(headers or {}),
            times=times,
            after=after,
            drop_connection=drop_connection,
            truncate_to=truncate_to,
            wrong_bytes=wrong_bytes,
            delay=delay,
        )
        return self._dispatcher.faults.add(fault)

    def clear_faults(self) -> None:
        """Cancel all faults."""
        self._dispatcher.faults.clear()

    def _repo(self, repo_id: str) -> Repo:
        repo = self.state.store.get(repo_id)
        if repo is None:
            raise KeyError(f"The test Hub has no repository {repo_id!r}")
        return repo

    def _commit(
        self,
        repo: Repo,
        files: Files | None,
        delete: Iterable[str],
        head: Commit | None,
        branch: str,
        message: str,
    ) -> str:
        merged = dict(head.files) if head is not None else {}
        for path in delete:
            del merged[path]
        for path, content in _named(files).items():
            if isinstance(content, bytes):
                blob = self.state.blobs.add_bytes(content)
            else:
                blob = self.state.blobs.add_file(content)
            merged[path] = FileEntry(blob, self.state.is_large(path, blob.size, merged))
        commit = self.state.store.commit(repo, merged, parent=head, title=message, author=repo.namespace)
        repo.branches[branch] = commit.id
        return commit.id


def _named(files: Files | None) -> dict[str, bytes | Path]:
    """Bring what a test passes as files into one form."""
    if isinstance(files, Path):
        if not files.is_dir():
            raise NotADirectoryError(files)
        return {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
    return dict(files or {})
