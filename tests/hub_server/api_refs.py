"""Endpoints that create and delete branches and tags."""

from __future__ import annotations

from .errors import ApiError, forbidden, revision_not_found
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState

__all__ = ["router"]

router = Router()


@router.add("POST", "/api/models/{repo}/branch/{revision}")
def create_branch(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Create a branch."""
    target = hub.writable_repo(request, repo)
    start = target.resolve(request.json().get("startingPoint") or "main")
    with hub.store.lock:
        if revision in target.branches:
            raise ApiError(409, f"Reference already exists: refs/heads/{revision}")
        target.branches[revision] = start.id
    return json_response({})


@router.add("DELETE", "/api/models/{repo}/branch/{revision}")
def delete_branch(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Delete a branch; its commits stay reachable by their ids."""
    target = hub.writable_repo(request, repo)
    if revision == "main":
        raise forbidden("The main branch cannot be deleted")
    with hub.store.lock:
        if target.branches.pop(revision, None) is None:
            raise revision_not_found(revision)
    return Response()


@router.add("POST", "/api/models/{repo}/tag/{revision}")
def create_tag(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Give a revision a name that does not move."""
    target = hub.writable_repo(request, repo)
    tag = request.json().get("tag")
    if not isinstance(tag, str) or not tag:
        raise ApiError(400, "A tag needs a name")
    commit = target.resolve(revision)
    with hub.store.lock:
        if tag in target.tags:
            raise ApiError(409, f"Tag reference exists already: refs/tags/{tag}")
        target.tags[tag] = commit.id
    return json_response({})


@router.add("DELETE", "/api/models/{repo}/tag/{revision}")
def delete_tag(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Delete a tag."""
    target = hub.writable_repo(request, repo)
    with hub.store.lock:
        if target.tags.pop(revision, None) is None:
            raise revision_not_found(revision)
    return Response()
