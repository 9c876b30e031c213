"""Endpoints that take large files: the LFS batch, storage on the second port, completion and verification."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

from .errors import ApiError
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import Repo

__all__ = ["router"]

router = Router()

_CHUNK = 1 << 20


@router.add("POST", "/{repo}.git/info/lfs/objects/batch")
def batch(hub: HubState, request: Request, repo: str) -> Response:
    """Say for each object where to send it; what the repository holds needs no sending."""
    wanted = request.json()
    # An upload for a pull request names no ref: whoever may read may propose a change.
    if "ref" in wanted:
        target = hub.writable_repo(request, repo)
    else:
        target = hub.readable_repo(request, repo)
        hub.users.check_login(request.caller)
    if wanted.get("operation") != "upload":
        raise ApiError(422, "The test Hub takes uploads only; downloads go through resolve")
    objects = [_instructions(hub, target, str(item["oid"]), int(item["size"])) for item in wanted["objects"]]
    multipart = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    answer = {"transfer": "multipart" if multipart else "basic", "objects": objects, "hash_algo": "sha256"}
    return json_response(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _instructions(hub: HubState, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    item: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.lfs_objects:
        return item
    storage = f"/storage/{repo.id}/{oid}"
    header: dict[str, str] = {}
    if size < hub.multipart_threshold:
        href = hub.signed_url(hub.cdn_url, "PUT", storage)
    else:
        # The client sends the completion without its token, so this address is signed too.
        href = hub.signed_url(hub.hub_url, "POST", f"/api/complete_multipart/{repo.id}/{oid}")
        header["chunk_size"] = str(hub.part_size)
        for number in range(1, ceil(size / hub.part_size) + 1):
            header[str(number)] = hub.signed_url(hub.cdn_url, "PUT", storage, partNumber=str(number))
    verify = {"href": f"{hub.hub_url}/{repo.id}.git/info/lfs/objects/verify"}
    item["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
    return item


@router.add("PUT", "/storage/{repo}/{oid}", origin="cdn")
def store_object(hub: HubState, request: Request, repo: str, oid: str) -> Response:
    """Take an object, or one part of it."""
    hub.check_signature(request)
    target = _known_repo(hub, repo)
    path, sha256, md5 = hub.blobs.receive(request.body.chunks())
    part = request.query.get("partNumber")
    if part is not None:
        with hub.lock:
            hub.parts.setdefault((repo, oid), {})[int(part[-1])] = (path, md5)
    else:
        _keep(hub, target, path, sha256, oid)
    return Response(headers={"ETag": f'"{md5}"'})


@router.add("POST", "/api/complete_multipart/{repo}/{oid}")
def complete(hub: HubState, request: Request, repo: str, oid: str) -> Response:
    """Put the parts of an object together."""
    hub.check_signature(request)
    target = _known_repo(hub, repo)
    listed = request.json().get("parts", [])
    with hub.lock:
        stored = hub.parts.pop((repo, oid), {})
    expected = [{"partNumber": number, "etag": f'"{md5}"'} for number, (_, md5) in sorted(stored.items())]
    if not expected or listed != expected:
        raise ApiError(400, "InvalidPart: the parts listed are not the parts that were sent")
    files = [path for _, (path, _) in sorted(stored.items())]
    path, sha256, _ = hub.blobs.receive(_concatenate(files))
    for part in files:
        part.unlink()
    _keep(hub, target, path, sha256, oid)
    return json_response({})


@router.add("POST", "/{repo}.git/info/lfs/objects/verify")
def verify(hub: HubState, request: Request, repo: str) -> Response:
    """Confirm that an object arrived."""
    target = hub.readable_repo(request, repo)
    hub.users.check_login(request.caller)
    wanted = request.json()
    blob = hub.blobs.get(str(wanted.get("oid")))
    if blob is None or blob.sha256 not in target.lfs_objects:
        raise ApiError(404, "The object was not uploaded")
    if blob.size != wanted.get("size"):
        raise ApiError(422, f"The object has {blob.size} bytes")
    return json_response({})


def _known_repo(hub: HubState, repo_id: str) -> Repo:
    repo = hub.store.get(repo_id)
    if repo is None:
        raise ApiError(404, "NoSuchKey")
    return repo


def _concatenate(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                yield piece


def _keep(hub: HubState, repo: Repo, path: Path, sha256: str, oid: str) -> None:
    if sha256 != oid:
        path.unlink()
        raise ApiError(400, f"BadDigest: received sha256 {sha256}, expected {oid}")
    hub.blobs.add_file(path, move=True)
    with hub.store.lock:
        repo.lfs_objects.add(oid)
