"""What was asked of the server, for tests to look at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

__all__ = ["RequestLog", "RequestRecord"]


@dataclass
class RequestRecord:
    """One request and what became of it.

    Attributes:
        origin: `hub`, or `cdn` for the second port that large files go through.
        method: HTTP method.
        path: Path, percent-decoded, without the query.
        query: The query.
        range: The `Range` header.
        user: The user whose token came along; None for an anonymous request or a bad token.
        has_token: Whether any token came along.
        status: Status of the answer; None when the connection was dropped instead.
        bytes_sent: Size of the body that was sent.
        bytes_received: Size of the body that came in.
        faulty: Whether an injected fault changed the answer.
        routed: Whether the server knows the endpoint.
    """

    origin: str
    method: str
    path: str
    query: dict[str, list[str]] = field(default_factory=dict)
    range: str | None = None
    user: str | None = None
    has_token: bool = False
    status: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    faulty: bool = False
    routed: bool = True

    def __str__(self) -> str:
        marks = "".join(f" {mark}" for mark in (self.range, self.user and f"as {self.user}") if mark)
        flow = f"{self.status} in={self.bytes_received} out={self.bytes_sent}{' FAULT' if self.faulty else ''}"
        return f"{self.origin} {self.method} {self.path}{marks} -> {flow}"


class RequestLog:
    """All requests since the last `clear`, in the order they came in. Printed, it is one request a line."""

    def __init__(self) -> None:
        self._records: list[RequestRecord] = []
        self._lock = threading.Lock()

    def add(self, record: RequestRecord) -> None:
        """Note a request; called before it is answered, so that no answer can overtake its record."""
        with self._lock:
            self._records.append(record)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._records.clear()

    def snapshot(self) -> list[RequestRecord]:
        """The records as they are now."""
        with self._lock:
            return list(self._records)

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        return len(self.snapshot())

    def __repr__(self) -> str:
        return "\n".join(str(record) for record in self.snapshot()) or "(no requests)"

    def matching(
        self, method: str = "*", path: str = "*", *, origin: str = "*", status: int | None = None
    ) -> list[RequestRecord]:
        """Requests of a method and path.

        Args:
            method: HTTP method, or `*`.
            path: Pattern in which `*` also matches slashes.
            origin: `hub`, `cdn` or `*`.
            status: Status of the answer.
        """
        return [
            record
            for record in self
            if method in ("*", record.method)
            and fnmatchcase(record.path, path)
            and origin in ("*", record.origin)
            and status in (None, record.status)
        ]

    def downloads(self, path: str = "*") -> list[RequestRecord]:
        """Requests that brought file contents, from either origin.

        Args:
            path: Pattern; a path ends with that of the file, so `*.safetensors` does what it says.
        """
        kinds = ("/api/resolve-cache/", "/blobs/")
        return [
            record
            for record in self.matching("GET", path)
            if record.bytes_sent
            and record.status in (200, 206)
            and (record.path.startswith(kinds) or "/resolve/" in record.path)
        ]

    def uploads(self) -> list[RequestRecord]:
        """Requests that carried the contents of large files, whole or in parts."""
        return self.matching("PUT", origin="cdn")

    def commits(self) -> list[RequestRecord]:
        """Requests that made a commit."""
        return self.matching("POST", "/api/models/*/commit/*")

    def unrouted(self) -> list[RequestRecord]:
        """Requests to endpoints that the server does not have: a sign that a test relies on too much."""
        return [record for record in self if not record.routed]
