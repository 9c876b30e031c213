"""The refusals of the test Hub, worded as the public Hub words them.

The client picks its exception from the status, `X-Error-Code` and `X-Error-Message`, so these three matter;
the rest of the answer is for the reader of a failing test.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ApiError",
    "bad_credentials",
    "entry_not_found",
    "forbidden",
    "gated_repo",
    "login_required",
    "repo_not_found",
    "revision_not_found",
]


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: Goes into `X-Error-Message` and into the JSON body.
        code: `X-Error-Code`, when the Hub sends one.
        headers: Further headers.
        extra: Further fields of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{status} {code or ''} {message}")
        self.status = status
        self.message = message
        self.code = code
        self.headers: dict[str, str] = dict(headers or {})
        self.extra: dict[str, object] = dict(extra or {})


def bad_credentials() -> ApiError:
    """A token that is expired, revoked or unknown; the public Hub does not say which."""
    # The client compares this sentence literally, to tell a bad token from a missing repository.
    return ApiError(401, "Invalid credentials in Authorization header")


def login_required() -> ApiError:
    """An action that needs a user, asked for by nobody."""
    return ApiError(401, "Invalid username or password.")


def forbidden(message: str) -> ApiError:
    """A known user without the right to do this."""
    return ApiError(403, message)


def repo_not_found(*, anonymous: bool) -> ApiError:
    """A repository that is missing, or private and not for this caller: the two look alike on purpose."""
    # The public Hub answers an anonymous caller with a bare 401, which the client only knows over https;
    # on loopback the code has to be spelled out.
    if anonymous:
        return ApiError(401, "Invalid username or password.", code="RepoNotFound")
    return ApiError(404, "Repository not found", code="RepoNotFound")


def revision_not_found(revision: str) -> ApiError:
    """A branch, tag or commit that the repository does not have."""
    return ApiError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(commit: str, message: str = "Entry not found") -> ApiError:
    """A path that the revision does not have; the commit lets the client remember the absence."""
    return ApiError(404, message, code="EntryNotFound", headers={"X-Repo-Commit": commit})


def gated_repo(repo_id: str, page: str, *, anonymous: bool) -> ApiError:
    """The content of a gated repository, asked for by somebody who is not on its list."""
    restricted = f"Access to model {repo_id} is restricted"
    if anonymous:
        message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
        return ApiError(401, message, code="GatedRepo")
    message = f"{restricted} and you are not in the authorized list. Visit {page} to ask for access."
    return ApiError(403, message, code="GatedRepo")
