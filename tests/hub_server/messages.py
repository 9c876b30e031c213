"""What handlers see of a request and what they answer with; no sockets here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, Protocol

from .blobs import Blob
from .errors import ApiError
from .users import Caller

__all__ = ["Body", "Content", "Request", "Response", "blob_response", "error_response", "json_response"]

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Body:
    """The body of a request, read from the connection when it is wanted.

    Uploads come with a length or, when the client streams them, in chunks; both are read here.
    """

    def __init__(self, stream: _Stream, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._left = 0 if self._chunked else int(headers.get("Content-Length") or 0)
        self._done = False
        self.received = 0

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces of moderate size."""
        if self._done:
            return
        self._done = True
        if not self._chunked:
            yield from self._exactly(self._left)
            return
        while size := int(self._stream.readline().split(b";")[0] or b"0", 16):
            yield from self._exactly(size)
            self._stream.readline()
        while self._stream.readline().strip():
            pass

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def drain(self) -> None:
        """Read what nobody wanted, so that the connection can carry the next request."""
        for _ in self.chunks():
            pass

    def _exactly(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self._stream.read(min(count, _CHUNK))
            if not piece:
                raise ConnectionResetError("the client went away in the middle of a body")
            count -= len(piece)
            self.received += len(piece)
            yield piece


@dataclass
class Request:
    """One request.

    Attributes:
        origin: The port it came to: `hub` or `cdn`.
        method: HTTP method.
        path: Path, percent-decoded.
        raw_path: Path as sent.
        query: The query.
        headers: The headers.
        body: The body, unread.
        caller: The user, once identified.
    """

    origin: str
    method: str
    path: str
    raw_path: str
    query: dict[str, list[str]]
    headers: Message
    body: Body
    caller: Caller = field(default_factory=Caller)

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty when there is none."""
        raw = self.body.read()
        if not raw:
            return {}
        try:
            value = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ApiError(400, f"Malformed JSON: {error}") from error
        if not isinstance(value, dict):
            raise ApiError(400, "The body must be a JSON object")
        return value

    def flag(self, name: str) -> bool:
        """A yes-or-no parameter of the query."""
        return self.query.get(name, ["false"])[-1].lower() in ("1", "true")


@dataclass(frozen=True)
class Content:
    """A stretch of a stored file, to be sent without reading it whole."""

    blob: Blob
    start: int
    length: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces."""
        with self.blob.path.open("rb") as file:
            file.seek(self.start)
            left = self.length
            while left and (piece := file.read(min(left, _CHUNK))):
                left -= len(piece)
                yield piece


@dataclass
class Response:
    """An answer. Its length is always known: nothing is sent in chunks."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Content = b""

    @property
    def length(self) -> int:
        """Size of the body."""
        return self.body.length if isinstance(self.body, Content) else len(self.body)

    def chunks(self) -> Iterator[bytes]:
        """The body, in pieces."""
        if isinstance(self.body, Content):
            yield from self.body.chunks()
        elif self.body:
            yield self.body


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    merged = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    return Response(status, merged, json.dumps(value).encode())


def error_response(error: ApiError) -> Response:
    """A refusal, said in the headers and again in the body."""
    headers = dict(error.headers)
    # A header cannot hold line breaks, nor anything beyond latin-1.
    headers["X-Error-Message"] = " ".join(error.message.split()).encode("latin-1", "replace").decode("latin-1")
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return json_response({"error": error.message, **error.extra}, error.status, headers)


def blob_response(blob: Blob, wanted: str | None, headers: Mapping[str, str]) -> Response:
    """A content, or the range of it that was asked for.

    Args:
        blob: The content.
        wanted: The `Range` header. Several ranges at once, or another unit, give the whole content.
        headers: Headers of the answer.
    """
    merged = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = _RANGE.fullmatch(wanted.strip()) if wanted else None
    if match is None or match.groups() == ("", ""):
        return Response(200, merged, Content(blob, 0, blob.size))
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else blob.size, blob.size)
    else:
        start, stop = max(blob.size - int(last), 0), blob.size
    if start >= stop:
        return Response(416, {**merged, "Content-Range": f"bytes */{blob.size}"})
    merged["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Response(206, merged, Content(blob, start, stop - start))
