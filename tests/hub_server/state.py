"""What all handlers share: repositories, users, settings and signed addresses."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

from .blobs import BlobStore
from .classify import DEFAULT_GITATTRIBUTES, is_lfs_path, lfs_patterns
from .errors import ApiError, entry_not_found, repo_not_found
from .messages import Request
from .store import Commit, FileEntry, Repo, RepoStore
from .users import UserDirectory

__all__ = ["HubState"]

MIB = 1 << 20


@dataclass
class HubState:
    """The data of the Hub, and the size that decides how files travel.

    Attributes:
        root: Folder for contents and half-done uploads.
        lfs_threshold: From this size on, a file is large whatever its name.
    """

    root: Path
    lfs_threshold: int = 10 * MIB
    hub_url: str = ""
    cdn_url: str = ""
    users: UserDirectory = field(default_factory=UserDirectory)
    store: RepoStore = field(default_factory=RepoStore)

    def __post_init__(self) -> None:
        self.blobs = BlobStore(self.root / "blobs")
        # Signatures only have to differ from what a test could make up.
        self._secret = str(self.root).encode()

    def page(self, repo_id: str) -> str:
        """Address of the page of a repository."""
        return f"{self.hub_url}/{repo_id}"

    def visible_repo(self, request: Request, repo_id: str) -> Repo:
        """The repository that a request is about, if its caller may know of it."""
        repo = self.store.get(repo_id)
        if repo is None:
            raise repo_not_found(anonymous=request.caller.anonymous)
        self.users.check_visible(request.caller, repo)
        return repo

    def readable_repo(self, request: Request, repo_id: str) -> Repo:
        """The repository that a request is about, if its caller may read the files."""
        repo = self.visible_repo(request, repo_id)
        self.users.check_content(request.caller, repo, self.page(repo_id))
        return repo

    def writable_repo(self, request: Request, repo_id: str) -> Repo:
        """The repository that a request is about, if its caller may push to it."""
        repo = self.visible_repo(request, repo_id)
        self.users.check_write(request.caller, repo)
        return repo

    @staticmethod
    def entry(commit: Commit, path: str) -> FileEntry:
        """A file of a commit."""
        entry = commit.files.get(path)
        if entry is None:
            raise entry_not_found(commit.id)
        return entry

    def is_large(self, path: str, size: int, files: dict[str, FileEntry] | None = None) -> bool:
        """Whether a file goes to large-file storage, by its size or by the repository's `.gitattributes`."""
        attributes = (files or {}).get(".gitattributes")
        patterns = lfs_patterns(attributes.blob.read() if attributes else DEFAULT_GITATTRIBUTES)
        # Storage refuses empty objects, so an empty file stays in git whatever its name.
        return size > 0 and (size >= self.lfs_threshold or is_lfs_path(path, patterns))

    def signed_url(self, base: str, method: str, path: str, **query: str) -> str:
        """An address that works without a token, as storage and the CDN give them out."""
        signature = self._signature(method, path, query)
        return f"{base}{quote(path)}?{urlencode({**query, 'X-Test-Signature': signature})}"

    def check_signature(self, request: Request) -> None:
        """Accept only addresses that were given out by `signed_url`."""
        if request.headers.get("Authorization"):
            # Real storage refuses two kinds of credentials at once; a client that leaks its token shows here.
            raise ApiError(400, "Only one auth mechanism allowed")
        query = {name: values[-1] for name, values in request.query.items() if name != "X-Test-Signature"}
        expected = self._signature(request.method.replace("HEAD", "GET"), request.path, query)
        if not hmac.compare_digest(expected, request.query.get("X-Test-Signature", [""])[-1]):
            raise ApiError(403, "SignatureDoesNotMatch")

    def _signature(self, method: str, path: str, query: dict[str, str]) -> str:
        text = "\n".join([method, path, urlencode(sorted(query.items()))])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()
