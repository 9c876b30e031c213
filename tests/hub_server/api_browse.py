"""Endpoints that describe repositories: what they hold, their history and their refs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from .errors import entry_not_found
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import Commit, FileEntry, Repo, folder_ids, iso_date

__all__ = ["router"]

router = Router()

# Looking up last commits is slow on the public Hub, which therefore gives out shorter pages.
_EXPANDED_PAGE = 50
_SAFE = {"status": "safe", "avScan": None, "pickleImportScan": None}


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


@router.add("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Describe the given paths; those that do not exist are left out."""
    target = hub.visible_repo(request, repo)
    commit = target.resolve(revision)
    form = request.form()
    expand = form.get("expand", ["false"])[-1].lower() == "true"
    entries = _entries(commit)
    wanted = [entries[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in entries]
    return json_response([_with_history(target, commit, entry) if expand else entry for entry in wanted])


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
    return _page(hub, request, history, hub.page_size)


@router.add("GET", "/api/models/{repo}/refs")
def refs(hub: HubState, request: Request, repo: str) -> Response:
    """List branches, tags and, if asked to, pull requests."""
    target = hub.visible_repo(request, repo)

    def rows(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": sha} for name, sha in sorted(names.items())]

    answer = {
        "branches": rows(target.branches, "refs/heads/"),
        "tags": rows(target.tags, "refs/tags/"),
        "converts": [],
    }
    if request.flag("include_prs"):
        answer["pullRequests"] = rows(target.pulls, "")
    return json_response(answer)


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


def _with_history(repo: Repo, commit: Commit, entry: dict[str, Any]) -> dict[str, Any]:
    """Add the last commit that changed an entry."""
    path = entry["path"]

    def content(files: Mapping[str, FileEntry]) -> list[tuple[str, str]]:
        return sorted((name, e.oid) for name, e in files.items() if name == path or name.startswith(f"{path}/"))

    last = commit
    for earlier in repo.history(commit):
        if content(earlier.files) != content(commit.files):
            break
        last = earlier
    expanded = {**entry, "lastCommit": {"id": last.id, "title": last.title, "date": iso_date(last.time)}}
    if entry["type"] == "file":
        expanded["securityFileStatus"] = _SAFE
    return expanded


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
    size = hub.page_size
    if request.flag("expand"):
        rows = [_with_history(repo, commit, entry) for entry in rows]
        size = min(size, _EXPANDED_PAGE)
    return _page(hub, request, rows, size)


def _page(hub: HubState, request: Request, rows: Sequence[dict[str, Any]], size: int) -> Response:
    """Cut a listing into pages, linked by a header."""
    start = int(request.query.get("cursor", ["0"])[-1])
    headers = {"X-Total-Count": str(len(rows))}
    if start + size < len(rows):
        query = {**request.query, "cursor": [str(start + size)]}
        # The path is repeated as it was sent: decoding it would lose an encoded slash in a revision.
        headers["Link"] = f'<{hub.hub_url}{request.raw_path}?{urlencode(query, doseq=True)}>; rel="next"'
    return json_response(rows[start : start + size], headers=headers)
