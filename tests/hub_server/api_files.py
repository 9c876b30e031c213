"""Endpoints that give out file contents, with the redirects of the public Hub."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from .errors import ApiError
from .messages import Request, Response, blob_response
from .routing import Router
from .state import HubState
from .store import Commit, FileEntry, Repo

__all__ = ["router"]

router = Router()


@router.add("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(hub: HubState, request: Request, repo: str, revision: str, path: str) -> Response:
    """Point to the content of a file.

    A large file lies on the second port, behind a signed address. A small one has an address of its own that
    names the commit, unless a cache must not hold it: private and gated repositories, ids without a namespace
    and empty files are served at once.
    """
    target = hub.readable_repo(request, repo)
    commit = target.resolve(revision)
    entry = hub.entry(commit, path)
    headers = _headers(commit, entry)
    if entry.lfs:
        headers["Location"] = hub.signed_url(hub.cdn_url, "GET", f"/blobs/{entry.blob.sha256}/{repo}/{path}")
        return Response(302, headers)
    if _served_at_once(target, entry):
        return blob_response(entry.blob, request.headers.get("Range"), headers)
    cached = quote(f"/api/resolve-cache/models/{repo}/{commit.id}/{path}")
    headers["Location"] = f"{cached}?{urlencode({'etag': headers['ETag']})}"
    return Response(307, headers)


@router.add("GET", "/api/resolve-cache/models/{repo}/{revision}/{path}")
def resolve_cache(hub: HubState, request: Request, repo: str, revision: str, path: str) -> Response:
    """Give out a small file of a commit."""
    target = hub.readable_repo(request, repo)
    commit = target.resolve(revision)
    entry = hub.entry(commit, path)
    return blob_response(entry.blob, request.headers.get("Range"), _headers(commit, entry))


@router.add("GET", "/blobs/{oid}/{path}", origin="cdn")
def large_file(hub: HubState, request: Request, oid: str, path: str) -> Response:
    """Give out a large file. Repository and file name are in the path for the request log to show."""
    hub.check_signature(request)
    blob = hub.blobs.get(oid)
    if blob is None:
        raise ApiError(404, "NoSuchKey")
    return blob_response(blob, request.headers.get("Range"), {"ETag": f'"{oid}"'})


def _headers(commit: Commit, entry: FileEntry) -> dict[str, str]:
    etag = f'"{entry.etag}"'
    headers = {"X-Repo-Commit": commit.id, "ETag": etag, "Accept-Ranges": "bytes"}
    if entry.lfs:
        headers["X-Linked-ETag"] = etag
        headers["X-Linked-Size"] = str(entry.blob.size)
    return headers


def _served_at_once(repo: Repo, entry: FileEntry) -> bool:
    return repo.private or bool(repo.gated) or "/" not in repo.id or entry.blob.size == 0
