"""An HTTP server on loopback that serves one object, and fails as it is told."""

from __future__ import annotations

import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

SMALLEST_BODY = 64


class FaultyServer:
    """`faults` are used up, one a request; without one the answer is right.

    A status (`503`), `reset-before` the headers, `reset-mid` body, `short` (fewer bytes than
    announced, then an orderly end), `half-range` (fewer than asked for), `stall` (no answer until
    the server ends), `ignore-range`.
    """

    def __init__(self, data: bytes) -> None:
        self.faults: list[str] = []
        self.num_requests = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner._answer(self, data)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/folder/object.tar"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        with self._lock:
            self.num_requests += 1
            fault = self.faults.pop(0) if self.faults else "none"
        body, status = data, 200
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if span and fault != "ignore-range":
            body, status = data[int(span[1]) : int(span[2]) + 1], 206
        if fault == "stall":
            self._ended.wait()
            return
        if fault == "reset-before":
            _reset(request)
            return
        if fault == "half-range":
            body = body[: len(body) // 2]
        if fault.isdigit():
            body, status = b"", int(fault)
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        sent = len(body) // 2 if fault in ("short", "reset-mid") else len(body)
        request.wfile.write(body[:sent])
        if fault == "reset-mid":
            request.wfile.flush()
            _reset(request)


def _reset(request: BaseHTTPRequestHandler) -> None:
    """Closes the connection with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.close_connection = True
    request.connection.close()
