"""Who is calling, and what they may see and change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ApiError, bad_credentials, forbidden, gated_repo, login_required, repo_not_found

if TYPE_CHECKING:
    from .store import Repo

__all__ = ["ALICE", "ALICE_READ_ONLY", "BOB", "EXPIRED", "Caller", "UserDirectory"]

ALICE = "hf_test_alice"
ALICE_READ_ONLY = "hf_test_alice_read"
BOB = "hf_test_bob"
# Not registered anywhere: the Hub answers an expired token exactly as it answers one that never existed.
EXPIRED = "hf_test_expired"


@dataclass(frozen=True)
class Caller:
    """The user behind a request; `name` is None for an anonymous one."""

    name: str | None = None
    can_write: bool = False

    @property
    def anonymous(self) -> bool:
        """Whether no token came with the request."""
        return self.name is None


class UserDirectory:
    """Tokens and users: Alice and Bob."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}
        self.add_user("alice", ALICE)
        self.add_user("alice", ALICE_READ_ONLY, can_write=False)
        self.add_user("bob", BOB)

    def add_user(self, name: str, token: str, *, can_write: bool = True) -> None:
        """Register a token of a user; a user may have several."""
        self._callers[token] = Caller(name, can_write)

    def identify(self, authorization: str | None) -> Caller:
        """Turn an `Authorization` header into a caller.

        Raises:
            ApiError: The header holds a token that is not valid.
        """
        if authorization is None:
            return Caller()
        scheme, _, token = authorization.partition(" ")
        caller = self._callers.get(token.strip())
        if scheme.lower() != "bearer" or caller is None:
            raise bad_credentials()
        return caller

    def check_visible(self, caller: Caller, repo: Repo) -> None:
        """Let through whoever may know that the repository exists."""
        if repo.private and caller.name != repo.namespace and caller.name not in repo.granted:
            raise repo_not_found(anonymous=caller.anonymous)

    def check_content(self, caller: Caller, repo: Repo, page: str) -> None:
        """Let through whoever may read the files; the metadata of a gated repository is open to all."""
        self.check_visible(caller, repo)
        if repo.gated and caller.name != repo.namespace and caller.name not in repo.granted:
            raise gated_repo(repo.id, page, anonymous=caller.anonymous)

    def check_login(self, caller: Caller) -> str:
        """Let through any user, and name them."""
        if caller.name is None:
            raise login_required()
        return caller.name

    def check_namespace(self, caller: Caller, namespace: str) -> None:
        """Let through whoever may create or delete repositories of a namespace."""
        self.check_login(caller)
        if caller.name != namespace:
            raise forbidden(f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if not caller.can_write:
            raise self._read_only_token()

    def check_write(self, caller: Caller, repo: Repo) -> None:
        """Let through whoever may push to a repository."""
        self.check_visible(caller, repo)
        self.check_login(caller)
        if caller.name != repo.namespace:
            raise forbidden("Authorization error: you don't have write access to this repository.")
        if not caller.can_write:
            raise self._read_only_token()

    @staticmethod
    def _read_only_token() -> ApiError:
        return forbidden("you must use a write token to upload to a repository.")
