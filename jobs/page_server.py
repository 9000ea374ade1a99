"""A small HTTP server for one page of one user, on loopback alone.

Who may ask: only who knows the address that was printed, which has a secret in its path; other
users of the machine reach loopback too. Other sites in the same browser cannot: a request must name
a loopback host (a stranger's name that is made to point here does not), a POST must come from this
page, and no answer may be read or framed elsewhere.
"""

from __future__ import annotations

import json
import logging
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from model.errors import UserError
from pipeline.printable import printable

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
MAX_UPLOAD_BYTES = 32 << 20
MAX_THREADS = 8
MAX_PARAMETERS = 10
MAX_STRANGERS = 64  # connections that have not shown the secret yet
HEAD_SECONDS = 5.0  # for a request's whole head
IDLE_SECONDS = 30.0  # until a connection is closed that stops amid a body or an answer
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class RefusedError(Exception):
    """A request that gets no answer but a status and one line."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """`parameters` of the address; `body` of a POST; whether the browser has gone away."""

    parameters: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_given_up: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Answer:
    """`keep_seconds`: how long the browser may keep it."""

    kind: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    keep_seconds: int = 0


def as_json(document: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer("application/json", json.dumps(document).encode(), status)


# By method and the last part of the path.
Routes = Mapping[tuple[str, str], Callable[[Request], Answer]]


class PageServer(ThreadingHTTPServer):
    """Answers `routes`, MAX_THREADS requests of each at once; more wait for their turn, so that
    what is slow keeps waiting only its like.

    Who has not shown the secret keeps nobody waiting: such a connection is closed after
    HEAD_SECONDS, and the oldest of more than MAX_STRANGERS at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, routes: Routes, port: int) -> None:
        """Listens on a port, 0 for any that is free. Raises UserError where it is taken."""
        self.routes = routes
        self.folder = f"/{secrets.token_urlsafe(16)}/"
        self.turns = {route: threading.BoundedSemaphore(MAX_THREADS) for route in routes}
        self._strangers: dict[socket.socket, float] = {}  # when they came, the oldest first
        self._lock = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on port {port} ({error.strerror}); give another with --port"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}{self.folder}"

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._strangers[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.admit(request)

    def service_actions(self) -> None:
        """Between two connections, and twice a second: closes those of strangers."""
        with self._lock:
            too_many, now = len(self._strangers) - MAX_STRANGERS, time.monotonic()
            over = [
                connection
                for number, (connection, since) in enumerate(self._strangers.items())
                if number < too_many or now - since > HEAD_SECONDS
            ]
            for connection in over:
                del self._strangers[connection]
        for connection in over:
            with suppress(OSError):  # it has ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)  # which ends what its thread waits for

    def admit(self, connection: socket.socket) -> None:
        """It is no stranger's any more."""
        with self._lock:
            self._strangers.pop(connection, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away amid an answer is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            logger.exception("a request could not be answered")


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: PageServer
    timeout = IDLE_SECONDS
    server_version, sys_version = "tessera", ""
    default_request_version = "HTTP/1.0"  # Python's is one whose answers have no headers

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        try:
            answer = self._answer()
        except RefusedError as refused:
            answer = _told(str(refused), refused.status)
        except UserError as error:
            answer = _told(str(error), HTTPStatus.UNPROCESSABLE_ENTITY)
        except ConnectionError:
            raise
        except Exception as error:
            logger.exception("%s: unforeseen", self.path.rpartition("/")[2])
            message = f"unforeseen: {type(error).__name__}; see the terminal"
            answer = _told(message, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(answer)

    def _answer(self) -> Answer:
        self._refuse_strangers()
        try:
            address = urlsplit(self.path)
            parameters = parse_qsl(address.query, max_num_fields=MAX_PARAMETERS)
        except ValueError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "not an address of this page") from error
        folder, _, name = address.path.rpartition("/")
        if not secrets.compare_digest(f"{folder}/".encode(), self.server.folder.encode()):
            message = "open the whole address that `tessera browse` has printed"
            raise RefusedError(HTTPStatus.NOT_FOUND, message)
        route = self.command, name
        if route not in self.server.routes:
            raise RefusedError(HTTPStatus.NOT_FOUND, "nothing has this address")
        self.server.admit(self.connection)
        with self.server.turns[route]:
            body = self._body() if self.command == "POST" else b""
            if self._is_given_up():
                raise ConnectionAbortedError("the browser went away")
            return self.server.routes[route](Request(dict(parameters), body, self._is_given_up))

    def _refuse_strangers(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in HOSTS:
            message = f"expected one of {', '.join(HOSTS)} as the host"
            raise RefusedError(HTTPStatus.MISDIRECTED_REQUEST, message)
        if self.command == "POST" and self.headers.get("Origin") != f"http://{hosts[0]}":
            raise RefusedError(HTTPStatus.FORBIDDEN, "only this page may send pictures")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a body of a stated length")
        if len(length) > 15 or int(length) > MAX_UPLOAD_BYTES:
            message = f"more than {MAX_UPLOAD_BYTES >> 20} MiB; give a smaller picture"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        try:
            body = self.rfile.read(int(length))
        except TimeoutError as error:
            raise ConnectionAbortedError("the browser does not go on") from error
        if len(body) < int(length):
            raise ConnectionAbortedError("the browser went away")
        return body

    def _is_given_up(self) -> bool:
        """Whether the other end is closed, as a browser does it with what it wants no more."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        kept = f"private, max-age={answer.keep_seconds}" if answer.keep_seconds else "no-store"
        headers = {**HEADERS, "Content-Type": answer.kind, "Cache-Control": kept}
        for name, value in {**headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of requests refuses; it would repeat the request's text."""
        self._send(_told(HTTPStatus(code).phrase, HTTPStatus(code)))

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def _told(message: str, status: HTTPStatus) -> Answer:
    return as_json({"error": printable(message)}, status)
