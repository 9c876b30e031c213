"""Endpoints that push: what goes where, and the commit itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from .classify import is_ignored
from .errors import ApiError, entry_not_found, revision_not_found
from .messages import Request, Response, json_response
from .routing import Router
from .state import HubState
from .store import Commit, FileEntry, Repo

__all__ = ["router"]

router = Router()


@router.add("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Say for each file how it is to be sent, and what the revision holds under that name already."""
    target = _pushable(hub, request, repo)
    commit = target.resolve(revision)
    wanted = request.json()
    gitignore = wanted.get("gitIgnore")
    if gitignore is None:
        present = commit.files.get(".gitignore")
        gitignore = present.blob.read().decode() if present else ""
    answers = []
    for file in wanted.get("files", []):
        path = file["path"]
        large = hub.is_large(path, int(file["size"]), dict(commit.files))
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": is_ignored(path, gitignore),
        }
        if path in commit.files:
            # The client leaves a file out of the commit when this equals the id of what it would send.
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return json_response({"files": answers})


@router.add("POST", "/api/models/{repo}/commit/{revision}")
def create_commit(hub: HubState, request: Request, repo: str, revision: str) -> Response:
    """Apply a list of changes, all or none, and move the branch."""
    target = _pushable(hub, request, repo)
    author = hub.users.check_login(request.caller)
    header, changes = _parse(request.body.read())
    with hub.store.lock:
        new_pull = request.flag("create_pr")
        if new_pull and revision not in target.branches:
            raise revision_not_found(revision)
        refs = target.movable(revision)
        head = target.commits[refs[revision]]
        parent = str(header.get("parentCommit") or "")
        if not head.id.startswith(parent):
            if not new_pull:
                raise ApiError(412, "A commit has happened since. Please refresh and try again.")
            head = target.resolve(parent)
        files = dict(head.files)
        for kind, value in changes:
            _apply(hub, target, head, files, kind, value)
        commit = hub.store.commit(
            target,
            files,
            parent=head,
            title=str(header.get("summary") or ""),
            description=str(header.get("description") or ""),
            author=author,
        )
        number = len(target.pulls) + 1
        if new_pull:
            target.pulls[f"refs/pr/{number}"] = commit.id
        else:
            refs[revision] = commit.id
    page = hub.page(target.id)
    answer = {
        "success": True,
        "commitOid": commit.id,
        "commitUrl": f"{page}/commit/{commit.id}",
        "hookOutput": "",
    }
    if new_pull:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    return json_response(answer)


def _pushable(hub: HubState, request: Request, repo_id: str) -> Repo:
    """A repository to push to; with `create_pr`, whoever may read it may propose a change."""
    if request.flag("create_pr"):
        repo = hub.readable_repo(request, repo_id)
        hub.users.check_login(request.caller)
        return repo
    return hub.writable_repo(request, repo_id)


def _parse(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Read the header and the changes, one JSON object a line."""
    lines = list(_lines(body))
    if not lines or lines[0][0] != "header":
        raise ApiError(400, "The first line of a commit must be its header")
    if not lines[0][1].get("summary"):
        raise ApiError(400, "A commit needs a summary")
    return lines[0][1], lines[1:]


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(body.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            yield item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(400, f"Line {number} of the commit is malformed: {error}") from error


def _apply(
    hub: HubState, repo: Repo, head: Commit, files: dict[str, FileEntry], kind: str, value: dict[str, Any]
) -> None:
    """Make one change to the files of a commit in the making."""
    path = str(value.get("path", ""))
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ApiError(400, f"Invalid path: {path!r}")
    if kind == "file":
        files[path] = _regular_file(hub, path, value)
    elif kind == "lfsFile":
        blob = hub.blobs.get(str(value.get("oid")))
        if blob is None or blob.sha256 not in repo.lfs_objects:
            reason = "an LFS pointer pointed to a file that does not exist"
            raise ApiError(400, f"Your push was rejected because {reason}: {path}")
        files[path] = FileEntry(blob, lfs=True)
    elif kind == "deletedFile":
        if files.pop(path, None) is None:
            raise entry_not_found(head.id, f"A file with this name doesn't exist: {path}")
    else:
        raise ApiError(400, f"Unknown kind of change: {kind}")


def _regular_file(hub: HubState, path: str, value: dict[str, Any]) -> FileEntry:
    raw = base64.b64decode(value["content"], validate=True)
    if len(raw) >= hub.lfs_threshold:
        raise ApiError(400, f"Your push was rejected because {path} is too large for git: use LFS")
    return FileEntry(hub.blobs.add_bytes(raw), lfs=False)
