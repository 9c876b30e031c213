"""The endpoint that creates branches."""

from __future__ import annotations

from .errors import ApiError
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
