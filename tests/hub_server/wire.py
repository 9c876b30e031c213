"""HTTP on the sockets: one origin (a port), and the reading and sending of its messages."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .dispatch import Dispatcher, Outcome
from .faults import WRONG_BYTES
from .messages import Body, Request

__all__ = ["Origin"]


class _Handler(BaseHTTPRequestHandler):
    """Reads requests of one connection and sends their answers."""

    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; without this the second waits for the first to be acknowledged.
    disable_nagle_algorithm = True
    server: Origin

    def _serve(self) -> None:
        target = urlsplit(self.path)
        request = Request(
            origin=self.server.name,
            method=self.command,
            path=unquote(target.path),
            raw_path=target.path,
            query=parse_qs(target.query, keep_blank_values=True),
            headers=self.headers,
            body=Body(self.rfile, self.headers),
        )
        outcome = self.server.dispatcher.answer(request)
        if outcome.response is None:
            self._hang_up()
        else:
            self._send(outcome)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _send(self, outcome: Outcome) -> None:
        response, record, fault = outcome.response, outcome.record, outcome.fault
        assert response is not None
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(response.length))
        self.send_header("X-Request-Id", f"Root=1-test-{id(record):x}")
        self.end_headers()
        if self.command == "HEAD":
            return
        success = response.status in (200, 206)
        left = response.length
        if fault is not None and fault.truncate_to is not None and success:
            left = min(left, fault.truncate_to)
        for chunk in response.chunks():
            piece = chunk[:left]
            if fault is not None and fault.wrong_bytes and success:
                piece = piece.translate(WRONG_BYTES)
            left -= len(piece)
            # Counted before it is sent: a client that has the last byte may look at the record at once.
            record.bytes_sent += len(piece)
            self.wfile.write(piece)
            if not left:
                break
        if record.bytes_sent < response.length:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        _shut(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the request log says it better."""


class Origin(ThreadingHTTPServer):
    """One port on loopback.

    Args:
        name: `hub` or `cdn`.
        dispatcher: Answers the requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str, dispatcher: Dispatcher) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.dispatcher = dispatcher
        self.crashes: list[str] = []
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        # A short poll: it bounds how long `shutdown` takes.
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hub-{name}", daemon=True)

    @property
    def url(self) -> str:
        """Address of the port."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection to it, so that a client sees the server gone."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _shut(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note a connection, then give it a thread."""
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that ends."""
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the traceback of an endpoint that failed; a client that goes away is none of our failures."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.crashes.append(traceback.format_exc())
            super().handle_error(request, client_address)


def _shut(connection: socket.socket) -> None:
    """End a connection at once."""
    # The client may have been faster.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
