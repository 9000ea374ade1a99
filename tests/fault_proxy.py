"""A proxy on loopback between a job and a real S3 server that disturbs what passes, by rule.

Signatures stay valid: path, query and signed headers are passed on as they came, `Host` too. What a
request meets is a function of the seed, the rule and the request itself (with the count of its
repetitions), so two runs of one job meet the same faults whatever the order of their threads.
"""

from __future__ import annotations

import fnmatch
import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

# What the store itself would say; a HEAD gets the status alone.
ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "404": (404, "NoSuchKey", "The specified key does not exist."),
    "403": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
BEFORE_THE_STORE = ("reset-before", "stall-before")
ON_THE_ANSWER = (
    "reset-mid",
    "fin-mid",
    "stall-mid",
    "slow",
    "longer-length",
    "shorter-length",
    "flip-answer",
    "flip-upload",
    "lost-ack",
    "hide",
    "stale-list",
)
FAULTS = (*ERRORS, *BEFORE_THE_STORE, *ON_THE_ANSWER)
# What a job should live through without a trace, where the store's answers carry checksums.
TRANSIENT = ("500", "503", *BEFORE_THE_STORE, "reset-mid", "fin-mid", "stall-mid", "slow")
SLOW_PIECE_BYTES = 4096
BREAK_SECONDS = 0.5  # between the last bytes and the break, so that they are not lost with it


@dataclass(frozen=True)
class Rule:
    """What to do to which requests.

    Args:
        fault: one of FAULTS. `hide` takes keys that match `hidden` out of a listing; `stale-list`
            gives the first answer again that the same listing had.
        operation: GET, HEAD, PUT, POST, DELETE, LIST, or `*`.
        key: pattern of `bucket/key` (of a listing: `bucket/prefix`).
        nth: which of the matching requests, counted from 1; None: any.
        probability: of each of those.
        times: at most this often; None: no limit.
        at: which byte of the body is flipped; None: the middle one.
    """

    fault: str
    operation: str = "*"
    key: str = "*"
    nth: Sequence[int] | None = None
    probability: float = 1.0
    times: int | None = None
    bytes_per_second: int = 100_000
    hidden: str = "*"
    at: int | None = None

    def __post_init__(self) -> None:
        assert self.fault in FAULTS, self.fault


@dataclass(frozen=True)
class Request:
    """What came, and whose key signed it.

    `fault`: what was done to it; `status`: what the store said (0: it was not asked).
    """

    operation: str
    key: str
    range: str | None
    query: str
    access_key: str | None
    fault: str | None
    status: int


@dataclass(frozen=True)
class Answer:
    """What the store said, or what is said in its place."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass
class _Matched:
    """How often a rule was met and used."""

    seen: int = 0
    used: int = 0
    repetitions: Counter[str] = field(default_factory=Counter)


class FaultProxy:
    """Forwards from `endpoint` to `upstream`. `rules` may be changed while it runs.

    The first rule that takes a request decides. `requests` holds what came, `counts` the faults.
    """

    def __init__(self, upstream: str, rules: Sequence[Rule] = (), seed: int = 0) -> None:
        self.seed = seed
        self.requests: list[Request] = []
        self.counts: Counter[str] = Counter()
        self._upstream = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._listings: dict[str, Answer] = {}
        self._bucket: str | None = None
        self.rules = rules
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                owner._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that went away in the middle is no news here

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    @rules.setter
    def rules(self, rules: Sequence[Rule]) -> None:
        with self._lock:
            self._rules = tuple(rules)
            self._matched = [_Matched() for _ in self._rules]

    def __enter__(self) -> FaultProxy:
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

    def restart(self, bucket: str | None = None) -> None:
        """Forgets what came, and all rules. Of other buckets than `bucket` nothing is disturbed or
        written down from here on: what was given up before may come late."""
        self.rules = ()
        with self._lock:
            self._bucket = bucket
            self.requests.clear()
            self.counts.clear()
            self._listings.clear()

    def seen(self, operation: str = "*", key: str = "*") -> list[Request]:
        """The requests that came, in the order of their answers."""
        with self._lock:
            return [
                request
                for request in self.requests
                if operation in ("*", request.operation) and fnmatch.fnmatch(request.key, key)
            ]

    def _is_ours(self, key: str) -> bool:
        return self._bucket in (None, key.partition("/")[0])

    def _choose(self, operation: str, key: str, identity: str) -> Rule | None:
        with self._lock:
            for number, (rule, matched) in enumerate(zip(self._rules, self._matched, strict=True)):
                if rule.operation not in ("*", operation) or not fnmatch.fnmatch(key, rule.key):
                    continue
                matched.seen += 1
                if rule.nth is not None and matched.seen not in rule.nth:
                    continue
                if rule.times is not None and matched.used >= rule.times:
                    continue
                matched.repetitions[identity] += 1
                roll = f"{self.seed} {number} {identity} {matched.repetitions[identity]}"
                if random.Random(roll).random() < rule.probability:
                    matched.used += 1
                    return rule
        return None

    def _handle(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        url = urlsplit(client.path)
        query = parse_qs(url.query, keep_blank_values=True)
        operation, key = client.command, unquote(url.path).lstrip("/")
        if operation == "GET" and ("list-type" in query or "versions" in query):
            operation, key = "LIST", f"{key}/{query.get('prefix', [''])[0]}"
        span = client.headers.get("Range")
        signed = re.search(r"Credential=([^/]+)/", client.headers.get("Authorization", ""))
        signer = signed[1] if signed else None
        path = re.sub(r"_runs/[^/]+/", "_runs/*/", client.path)  # whose names are made up
        identity = f"{client.command} {path} {span}"
        rule = self._choose(operation, key, identity) if self._is_ours(key) else None
        fault = rule.fault if rule is not None else None

        def book(status: int) -> None:
            request = Request(operation, key, span, url.query, signer, fault, status)
            with self._lock:
                if not self._is_ours(key):  # `restart` came meanwhile
                    return
                self.requests.append(request)
                if fault is not None:
                    self.counts[fault] += 1

        if fault in ERRORS:
            book(0)
            _send(client, _error(fault))
            return
        if fault in BEFORE_THE_STORE:
            book(0)
            if fault == "stall-before":
                self._ended.wait()
            _reset(client)
            return
        if rule is not None and fault == "flip-upload":
            body = _flipped(body, rule.at)
        answer = self._forward(client, body)
        book(answer.status)
        if operation == "LIST":
            first = self._listings.setdefault(client.path, answer)
            answer = first if fault == "stale-list" else answer
        if rule is None:
            _send(client, answer)
        else:
            self._disturb(client, answer, rule)

    def _forward(self, client: BaseHTTPRequestHandler, body: bytes) -> Answer:
        store = http.client.HTTPConnection(self._upstream, timeout=60)
        store.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
        for name, value in client.headers.items():
            if name.lower() not in ("connection", "expect"):  # neither is signed
                store.putheader(name, value)
        store.putheader("Connection", "close")
        store.endheaders(body)
        answer = store.getresponse()
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "keep-alive")
        ]
        whole = Answer(answer.status, tuple(headers), answer.read())
        store.close()
        return whole

    def _disturb(self, client: BaseHTTPRequestHandler, answer: Answer, rule: Rule) -> None:
        body = answer.body
        half = len(body) // 2
        match rule.fault:
            case "flip-answer":
                _send(client, Answer(answer.status, answer.headers, _flipped(body, rule.at)))
            case "hide":
                _send(client, _hidden(answer, rule.hidden))
            case "lost-ack":
                _reset(client)
            case "reset-mid":
                _send(client, answer, body[:half])
                self._ended.wait(BREAK_SECONDS)
                _reset(client)
            case "fin-mid":
                _send(client, answer, body[:half])
                self._ended.wait(BREAK_SECONDS)
                client.close_connection = True
            case "stall-mid":
                _send(client, answer, body[:half])
                self._ended.wait()
            case "longer-length":  # and an orderly end after what there is
                _send(client, answer, body, length=len(body) + 1000)
                client.close_connection = True
            case "shorter-length":  # whole by its own header
                _send(client, answer, body[:half], length=half)
            case "slow":
                _send(client, answer, b"")
                pause = SLOW_PIECE_BYTES / rule.bytes_per_second
                for start in range(0, len(body), SLOW_PIECE_BYTES):
                    client.wfile.write(body[start : start + SLOW_PIECE_BYTES])
                    if self._ended.wait(pause):
                        return
            case _:  # flip-upload, stale-list: done already
                _send(client, answer)


def _send(
    client: BaseHTTPRequestHandler,
    answer: Answer,
    body: bytes | None = None,
    length: int | None = None,
) -> None:
    """Headers as the store gave them (unless `length` says else), then as much as `body` holds."""
    head = client.command == "HEAD"
    client.send_response_only(answer.status)
    for name, value in answer.headers:
        if name.lower() != "content-length" or (head and length is None):
            client.send_header(name, value)
    if not head or length is not None:
        client.send_header("Content-Length", str(len(answer.body) if length is None else length))
    client.end_headers()
    if not head:
        client.wfile.write(answer.body if body is None else body)
        client.wfile.flush()


def _error(fault: str) -> Answer:
    status, code, message = ERRORS[fault]
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{message}</Message><RequestId>1</RequestId></Error>"
    )
    return Answer(status, (("Content-Type", "application/xml"),), text.encode())


def _flipped(body: bytes, at: int | None) -> bytes:
    """The lowest bit of one byte is another."""
    changed = bytearray(body)
    if changed:
        changed[len(changed) // 2 if at is None else at] ^= 1
    return bytes(changed)


def _hidden(answer: Answer, pattern: str) -> Answer:
    """A listing without the keys that match."""

    def keep(found: re.Match[bytes]) -> bytes:
        key = re.search(rb"<Key>(.*?)</Key>", found[0])
        assert key is not None
        return b"" if fnmatch.fnmatch(unquote(key[1].decode()), pattern) else found[0]

    body = re.sub(rb"<Contents>.*?</Contents>", keep, answer.body, flags=re.DOTALL)
    count = body.count(b"<Contents>") + body.count(b"<CommonPrefixes>")
    body = re.sub(rb"<KeyCount>\d+</KeyCount>", b"<KeyCount>%d</KeyCount>" % count, body)
    return Answer(answer.status, answer.headers, body)


def _reset(client: BaseHTTPRequestHandler) -> None:
    """Closes the connection with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close_connection = True
    client.connection.close()
