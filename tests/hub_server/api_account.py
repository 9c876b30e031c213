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
    organizations = [
        {"type": "org", "name": org, "fullname": org, "roleInOrg": role} for org in hub.users.organizations_of(name)
    ]
    return json_response(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name.title(),
            "isPro": False,
            "orgs": organizations,
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


@router.add("POST", "/api/validate-yaml")
def validate_yaml(hub: HubState, request: Request) -> Response:
    """Check the metadata of a model card.

    Only the fence of the block is checked: the standard library has no YAML parser.
    """
    content = str(request.json().get("content", ""))
    if not content.startswith("---"):
        warning = "empty or missing yaml metadata in repo card"
        return json_response({"errors": [], "warnings": [{"message": warning}]})
    if "\n---" not in content[3:]:
        return json_response({"errors": [{"message": "metadata block is not closed"}], "warnings": []}, 400)
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


@router.add("PUT", "/api/models/{repo}/settings")
def update_settings(hub: HubState, request: Request, repo: str) -> Response:
    """Change who may see a repository."""
    target = hub.writable_repo(request, repo)
    wanted = request.json()
    with hub.store.lock:
        if "visibility" in wanted:
            target.private = wanted["visibility"] == "private"
        elif "private" in wanted:
            target.private = bool(wanted["private"])
        if "gated" in wanted:
            target.gated = wanted["gated"]
    return json_response({"private": target.private, "gated": target.gated})


@router.add("GET", "/api/models/{repo}/auth-check")
def auth_check(hub: HubState, request: Request, repo: str) -> Response:
    """Whether the caller may read the files."""
    hub.readable_repo(request, repo)
    return json_response({})


@router.add("GET", "/api/models/{repo}/auth-check/write")
def auth_check_write(hub: HubState, request: Request, repo: str) -> Response:
    """Whether the caller may push."""
    hub.writable_repo(request, repo)
    return json_response({})


@router.add("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubState, request: Request) -> Response:
    """A registry that the client fetches once a day for its user agent; it holds nothing here."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


@router.add("GET", "/api/telemetry/{path}")
def telemetry(hub: HubState, request: Request, path: str) -> Response:
    """Accept and forget, for libraries whose telemetry was not switched off."""
    return Response()


def _repo_id(wanted: dict[str, Any], caller: str) -> str:
    if wanted.get("type", "model") != "model":
        raise ApiError(400, "The test Hub has models only")
    if not wanted.get("name"):
        raise repo_not_found(anonymous=False)
    return f"{wanted.get('organization') or caller}/{wanted['name']}"
