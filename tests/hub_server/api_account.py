"""Endpoints about users and about repositories as a whole."""

from __future__ import annotations

from typing import Any

from .classify import DEFAULT_GITATTRIBUTES
from .errors import ApiError, repo_not_found
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import FileEntry

__all__ = ["router"]

router = Router()


@router.add("GET", "/api/whoami-v2")
def whoami(hub: HubState, request: Request) -> Response:
    """Who the token belongs to."""
    name = hub.users.check_login(request.caller)
    role = "write" if request.caller.can_write else "read"
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return json_response({"type": "user", "id": name, "name": name, "isPro": False, "orgs": [], "auth": auth})


@router.add("POST", "/api/validate-yaml")
def validate_yaml(hub: HubState, request: Request) -> Response:
    """Accept the metadata of a model card."""
    return json_response({"errors": [], "warnings": []})


@router.add("POST", "/api/repos/create")
def create_repo(hub: HubState, request: Request) -> Response:
    """Create a repository, with the first commit that the Hub makes itself."""
    wanted = request.json()
    caller = hub.users.check_login(request.caller)
    repo_id = _repo_id(wanted, caller)
    url = hub.page(repo_id)
    hub.users.check_namespace(request.caller, repo_id.split("/")[0])
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    with hub.store.lock:
        if hub.store.get(repo_id) is not None:
            # The client takes the address from here when `exist_ok` is set.
            raise ApiError(409, "You already created this model repo", extra={"url": url})
        repo = hub.store.create(repo_id, private=private)
        entry = FileEntry(hub.blobs.add_bytes(DEFAULT_GITATTRIBUTES), lfs=False)
        commit = hub.store.commit(repo, {".gitattributes": entry}, parent=None, title="initial commit", author=caller)
        repo.branches["main"] = commit.id
    return json_response({"url": url, "name": repo_id, "id": repo_id, "private": private})


@router.add("DELETE", "/api/repos/delete")
def delete_repo(hub: HubState, request: Request) -> Response:
    """Delete a repository."""
    wanted = request.json()
    repo_id = _repo_id(wanted, hub.users.check_login(request.caller))
    repo = hub.visible_repo(request, repo_id)
    hub.users.check_namespace(request.caller, repo.namespace)
    hub.store.delete(repo_id)
    return Response()


@router.add("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubState, request: Request) -> Response:
    """A registry that the client fetches once a day for its user agent; it holds nothing here."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


def _repo_id(wanted: dict[str, Any], caller: str) -> str:
    if wanted.get("type", "model") != "model":
        raise ApiError(400, "The test Hub has models only")
    if not wanted.get("name"):
        raise repo_not_found(anonymous=False)
    return f"{wanted.get('organization') or caller}/{wanted['name']}"
