"""Endpoints that describe repositories: what they hold, and their history."""

from __future__ import annotations

import json
from typing import Any

from .errors import entry_not_found
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import Commit, Repo, folder_ids, iso_date

__all__ = ["router"]

router = Router()


@router.add("GET", "/api/models/{repo}")
def model_info(hub: HubState, request: Request, repo: str) -> Response:
    """Describe a repository at the head of its main branch."""
    target = hub.visible_repo(request, repo)
    return _describe(target, target.resolve("main"), request)


@router.add("GET", "/api/models/{repo}/revision/{revision}")
def model_info_at(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Describe a repository at a revision."""
    target = hub.visible_repo(request, repo)
    return _describe(target, target.resolve(revision), request)


@router.add("GET", "/api/models/{repo}/tree/{revision}")
def tree(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """List the files and folders of a revision."""
    return _tree(hub, request, repo, revision, "")


@router.add("GET", "/api/models/{repo}/tree/{revision}/{path}")
def subtree(hub: HubState, request: Request, repo: str, revision: str, path: str) -> Response:
    """List the files and folders below a folder."""
    return _tree(hub, request, repo, revision, path.strip("/"))


@router.add("GET", "/api/models/{repo}/commits/{revision}")
def commits(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """List the commits that led to a revision, newest first."""
    target = hub.visible_repo(request, repo)
    history = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": iso_date(commit.time),
            "formatted": {"title": commit.title, "message": commit.description},
        }
        for commit in target.history(target.resolve(revision))
    ]
    return json_response(history)


def _describe(repo: Repo, commit: Commit, request: Request) -> Response:
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if request.flag("blobs"):
        for sibling in siblings:
            entry = commit.files[sibling["rfilename"]]
            sibling.update(size=entry.blob.size, blobId=entry.oid)
            if entry.lfs:
                sibling["lfs"] = {
                    "sha256": entry.blob.sha256,
                    "size": entry.blob.size,
                    "pointerSize": len(entry.pointer),
                }
    config = _config(commit)
    library = ["transformers"] if "architectures" in config else []
    answer: dict[str, Any] = {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "lastModified": iso_date(commit.time),
        "createdAt": iso_date(repo.created),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": library,
        "config": {name: config[name] for name in ("architectures", "model_type") if name in config},
        "siblings": siblings,
        "usedStorage": sum(entry.blob.size for entry in commit.files.values()),
    }
    if library:
        answer["library_name"] = library[0]
    wanted = request.query.get("expand", []) + request.query.get("expand[]", [])
    if wanted:
        answer = {name: value for name, value in answer.items() if name in ("_id", "id", *wanted)}
    return json_response(answer, headers={"X-Repo-Commit": commit.id})


def _config(commit: Commit) -> dict[str, Any]:
    entry = commit.files.get("config.json")
    if entry is None:
        return {}
    try:
        value = json.loads(entry.blob.read())
    except ValueError:
        # A broken config.json is a legitimate thing to push; it only goes without a description.
        return {}
    return value if isinstance(value, dict) else {}


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Everything in a commit, by path, as the Hub describes it."""
    rows: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "oid": oid, "size": 0, "path": path}
        for path, oid in folder_ids(commit.files).items()
        if path
    }
    for path, entry in commit.files.items():
        rows[path] = {"type": "file", "oid": entry.oid, "size": entry.blob.size, "path": path}
        if entry.lfs:
            pointer_size = len(entry.pointer)
            rows[path]["lfs"] = {
                "oid": entry.blob.sha256,
                "size": entry.blob.size,
                "pointerSize": pointer_size,
            }
    return dict(sorted(rows.items()))


def _tree(hub: HubState, request: Request, repo_id: str, revision: str, folder: str) -> Response:
    repo = hub.visible_repo(request, repo_id)
    commit = repo.resolve(revision)
    entries = _entries(commit)
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise entry_not_found(commit.id, f'{folder} does not exist on "{revision}"')
    prefix = f"{folder}/" if folder else ""
    rows = [entry for path, entry in entries.items() if path.startswith(prefix)]
    if not request.flag("recursive"):
        rows = [entry for entry in rows if "/" not in entry["path"].removeprefix(prefix)]
    return json_response(rows)
