"""Endpoints that take large files: the LFS batch, storage on the second port, and verification."""

from __future__ import annotations

from typing import Any

from .errors import ApiError
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import Repo

__all__ = ["router"]

router = Router()


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
    answer = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
    return json_response(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _instructions(hub: HubState, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    item: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.lfs_objects:
        return item
    href = hub.signed_url(hub.cdn_url, "PUT", f"/storage/{repo.id}/{oid}")
    verify = {"href": f"{hub.hub_url}/{repo.id}.git/info/lfs/objects/verify"}
    item["actions"] = {"upload": {"href": href}, "verify": verify}
    return item


@router.add("PUT", "/storage/{repo}/{oid}", origin="cdn")
def store_object(hub: HubState, request: Request, repo: str, oid: str) -> Response:
    """Take an object."""
    hub.check_signature(request)
    target = hub.store.get(repo)
    if target is None:
        raise ApiError(404, "NoSuchKey")
    path, sha256 = hub.blobs.receive(request.body.chunks())
    if sha256 != oid:
        path.unlink()
        raise ApiError(400, f"BadDigest: received sha256 {sha256}, expected {oid}")
    hub.blobs.add_file(path, move=True)
    with hub.store.lock:
        target.lfs_objects.add(oid)
    return Response(headers={"ETag": f'"{oid}"'})


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
