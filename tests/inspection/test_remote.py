"""Ranges of files on the Hub, also from a server that knows no ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from transplant_hf.inspection import files

PIECE = bytes(range(256)) * 256
PIECES = 2000


class _Endless(BaseHTTPRequestHandler):
    """Sends all of a large file, whatever range is asked for."""

    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(PIECES * len(PIECE)))
        self.end_headers()
        try:
            for _ in range(PIECES):
                self.wfile.write(PIECE)
                _Endless.sent += len(PIECE)
        except ConnectionError:  # the client has seen enough
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Endless]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(files, "hf_hub_url", lambda *_, **__: f"http://127.0.0.1:{server.server_port}/x")
    yield _Endless
    server.shutdown()
    server.server_close()


@pytest.mark.hub
@pytest.mark.parametrize(("start", "count"), [(0, 100), (70_000, 1000), (5, 0)])
def test_a_server_that_knows_no_ranges(endless: type[_Endless], start: int, count: int) -> None:
    _Endless.sent = 0
    found = files.fetch_range("alice/large", "model.safetensors", "main", start, count, None)
    assert found == (PIECE * 3)[start : start + count]
    assert endless.sent < PIECES * len(PIECE) // 4
