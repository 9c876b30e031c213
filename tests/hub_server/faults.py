"""Faults to order: the next requests that match fail as a test wants them to."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from .errors import ApiError

__all__ = ["Fault", "FaultBoard"]

# Translating is the fastest way to make every byte wrong while keeping the size.
WRONG_BYTES = bytes(255 - value for value in range(256))


@dataclass
class Fault:
    """One way to fail, for requests that match.

    Attributes:
        method: HTTP method, or `*`.
        path_pattern: Pattern on the decoded path, in which `*` also matches slashes.
        status: Answer with this status instead of doing what was asked.
        message: Message of that answer.
        code: `X-Error-Code` of that answer.
        headers: Headers of that answer, such as `Retry-After`.
        times: How many requests fail; None for all.
        after: How many matching requests are let through first.
        drop_connection: True or `"before"` closes the connection instead of answering. `"after"` does what
            was asked and then closes it: the client cannot know that it worked.
        truncate_to: Announce the whole body, send this many bytes of it and close the connection.
        wrong_bytes: Send a body of the right size with every byte changed.
        delay: Seconds to wait before the answer.
        hits: How many requests were hit so far.
    """

    method: str
    path_pattern: str
    status: int | None = None
    message: str = "Injected fault"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int | None = 1
    after: int = 0
    drop_connection: bool | Literal["before", "after"] = False
    truncate_to: int | None = None
    wrong_bytes: bool = False
    delay: float = 0.0
    hits: int = 0
    _seen: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        effects = (
            self.status,
            self.drop_connection,
            self.truncate_to is not None,
            self.wrong_bytes,
            self.delay,
        )
        if not any(effects):
            raise ValueError("A fault needs an effect: status, drop_connection, truncate_to, wrong_bytes or delay")

    @property
    def drops_before(self) -> bool:
        """Whether the connection closes before anything was done."""
        return self.drop_connection in (True, "before")

    @property
    def drops_after(self) -> bool:
        """Whether the connection closes once everything was done."""
        return self.drop_connection == "after"

    @property
    def error(self) -> ApiError | None:
        """The answer to give instead, if there is one."""
        if self.status is None:
            return None
        return ApiError(self.status, self.message, code=self.code, headers=self.headers)

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is of the kind that fails."""
        return self.method in ("*", method) and fnmatchcase(path, self.path_pattern)


class FaultBoard:
    """The faults that are still to happen."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Order a fault. Of several that match a request, the one that was ordered first happens."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Cancel all faults."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that a request runs into, if any."""
        with self._lock:
            for fault in self._faults:
                if not fault.matches(method, path) or (fault.times is not None and fault.hits >= fault.times):
                    continue
                fault._seen += 1
                if fault._seen > fault.after:
                    fault.hits += 1
                    return fault
        return None
