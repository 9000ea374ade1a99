"""Who gets an answer from the page's server, and how much one may ask of it."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from jobs import page_server
from jobs.page_server import (
    HEADERS,
    MAX_STRANGERS,
    MAX_THREADS,
    Answer,
    Handler,
    PageServer,
    Request,
    Routes,
    as_json,
)
from model.errors import UserError


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        told: str = json.loads(self.body)["error"]
        return told


class Client:
    """Asks a server that runs in this process."""

    def __init__(self, server: PageServer) -> None:
        self.server = server
        self.port = server.server_port

    def ask(
        self,
        method: str,
        name: str,
        body: bytes | None = None,
        folder: str | None = None,
        **headers: str,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        path = (self.server.folder if folder is None else folder) + name
        connection.putrequest(method, path, skip_host=True)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        length = {} if body is None else {"Content-Length": str(len(body))}
        for header, value in {"Host": f"127.0.0.1:{self.port}", **length, **given}.items():
            connection.putheader(header, value)
        connection.endheaders(body)
        return _reply(connection)

    def post(self, body: bytes, **headers: str) -> Reply:
        origin = f"http://127.0.0.1:{self.port}"
        return self.ask("POST", "take", body, **{"Origin": origin, **headers})

    def say(self, data: bytes) -> bytes:
        """Sends bytes as they are; gives all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            pieces = iter(lambda: connection.recv(65536), b"")
            return b"".join(pieces)


def _reply(connection: http.client.HTTPConnection) -> Reply:
    answer = connection.getresponse()
    reply = Reply(answer.status, dict(answer.headers), answer.read())
    connection.close()
    return reply


def fail(request: Request) -> Answer:
    raise RuntimeError("secret text")


def refuse(request: Request) -> Answer:
    raise UserError("a\nline \x1b[2J of it")


ROUTES: Routes = {
    ("GET", ""): lambda request: Answer("text/html", b"page"),
    ("GET", "echo"): lambda request: as_json(dict(request.parameters)),
    ("GET", "kept"): lambda request: Answer("image/jpeg", b"x", keep_seconds=60),
    ("GET", "fail"): fail,
    ("GET", "refuse"): refuse,
    ("POST", "take"): lambda request: as_json(len(request.body)),
}


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is closed because it, or the machine, is slow."""
    monkeypatch.setattr(page_server, "HEAD_SECONDS", 1e6)
    monkeypatch.setattr(Handler, "timeout", 600)


@pytest.fixture
def client() -> Iterator[Client]:
    with serving(ROUTES) as client:
        yield client


@contextmanager
def serving(routes: Routes) -> Iterator[Client]:
    with PageServer(routes, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


def test_an_answer_and_its_headers(client: Client) -> None:
    reply = client.ask("GET", "")
    assert (reply.status, reply.body) == (200, b"page")
    assert reply.headers["Content-Type"] == "text/html"
    assert reply.headers["Cache-Control"] == "no-store"
    assert HEADERS.items() <= reply.headers.items()
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]
    assert reply.headers["Server"].strip() == "tessera"
    assert client.ask("GET", "kept").headers["Cache-Control"] == "private, max-age=60"
    assert json.loads(client.ask("GET", "echo?a=1&b=%20x").body) == {"a": "1", "b": " x"}


def test_only_loopback_is_listened_on(client: Client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.", "[::1]:80"],
)
def test_a_name_that_is_made_to_point_here_gets_nothing(client: Client, host: str) -> None:
    reply = client.ask("GET", "", Host=host)
    assert reply.status == 421
    assert reply.error == "expected one of 127.0.0.1, localhost as the host"


def test_no_host_or_two_get_nothing(client: Client) -> None:
    good = f"Host: 127.0.0.1:{client.port}\r\n"
    line = f"GET {client.server.folder} HTTP/1.1\r\n"
    for hosts in ("", f"{good}Host: evil.example\r\n"):
        assert b" 421 " in client.say(f"{line}{hosts}\r\n".encode()).partition(b"\r\n")[0]


def test_a_tunnel_may_have_another_port(client: Client) -> None:
    assert client.ask("GET", "", Host="localhost:9000").status == 200


@pytest.mark.parametrize("folder", ["/", "/x/", "//"])
def test_who_does_not_know_the_address_gets_nothing(client: Client, folder: str) -> None:
    reply = client.ask("GET", "", folder=folder)
    assert reply.status == 404
    assert "open the whole address" in reply.error


def test_each_server_has_an_address_of_its_own(client: Client) -> None:
    assert re.fullmatch(r"/[\w-]{22}/", client.server.folder)
    with PageServer(ROUTES, 0) as other:
        assert other.folder != client.server.folder


def test_only_the_page_may_post(client: Client) -> None:
    assert json.loads(client.post(b"12345").body) == 5
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{client.port}"):
        assert client.post(b"12345", Origin=origin).status == 403
    assert client.ask("POST", "take", b"12345").status == 403
    assert client.ask("GET", "take").status == 404
    assert client.ask("OPTIONS", "take", Origin="http://evil.example").status == 501


def test_an_upload_has_a_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "MAX_UPLOAD_BYTES", 3 << 20)
    assert json.loads(client.post(bytes(3 << 20)).body) == 3 << 20
    for length in (str((3 << 20) + 1), "9" * 400):
        reply = client.post(b"", Content_Length=length)
        assert reply.status == 413
        assert reply.error == "more than 3 MiB; give a smaller picture"
    for length in ("-1", "x", "", "1_0", "\u0661"):
        assert client.post(b"", Content_Length=length.encode().decode("latin-1")).status == 411
    assert client.post(b"", Transfer_Encoding="chunked").status == 411


def test_a_browser_that_goes_away_is_no_error(
    client: Client, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = f"POST {client.server.folder}take HTTP/1.1\r\nHost: localhost\r\n"
    more = "Origin: http://localhost\r\nContent-Length: 100\r\n\r\n12345"
    assert client.say((lines + more).encode()) == b""
    assert json.loads(client.post(b"12345").body) == 5
    assert capfd.readouterr().err == ""
    assert caplog.text == ""


def test_a_request_whose_browser_has_gone_is_not_answered() -> None:
    """It waits behind others; when its turn comes, nobody does."""
    all_in, go, asked = threading.Barrier(MAX_THREADS + 1), threading.Event(), []

    def hold(request: Request) -> Answer:
        asked.append(request.parameters["by"])
        if request.parameters["by"] == "first":
            all_in.wait(60)
            assert go.wait(60)
        return as_json(request.is_given_up())

    with serving({("GET", "hold"): hold}) as client, ThreadPoolExecutor(MAX_THREADS + 1) as pool:
        held = [pool.submit(client.ask, "GET", "hold?by=first") for _ in range(MAX_THREADS)]
        all_in.wait(60)
        with stranger(client) as gone:
            path = f"{client.server.folder}hold?by=gone"
            gone.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        waits = pool.submit(client.ask, "GET", "hold?by=other")
        go.set()
        assert waits.result().status == 200
        assert [json.loads(reply.result().body) for reply in held] == [False] * MAX_THREADS
    assert asked == ["first"] * MAX_THREADS + ["other"]


def test_what_is_slow_keeps_nothing_else_waiting() -> None:
    all_in, go = threading.Barrier(MAX_THREADS + 1), threading.Event()

    def hold(request: Request) -> Answer:
        all_in.wait(120)
        assert go.wait(120)
        return as_json(True)

    routes = {**ROUTES, ("GET", "hold"): hold}
    with serving(routes) as client, ThreadPoolExecutor(2 * MAX_THREADS) as pool:
        held = [pool.submit(client.ask, "GET", "hold") for _ in range(MAX_THREADS)]
        all_in.wait(120)
        other = pool.submit(client.ask, "GET", "echo?a=1")
        try:
            assert json.loads(other.result(60).body) == {"a": "1"}
        finally:
            go.set()
        assert {reply.result().status for reply in held} == {200}


def test_what_cannot_be_is_told_in_a_line(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    reply = client.ask("GET", "refuse")
    assert (reply.status, reply.error) == (422, r"a\nline \x1b[2J of it")
    reply = client.ask("GET", "fail")
    assert (reply.status, reply.error) == (500, "unforeseen: RuntimeError; see the terminal")
    assert "secret text" in caplog.text
    assert client.server.folder not in caplog.text
    assert client.ask("GET", "nothing").status == 404
    assert client.ask("GET", "echo?" + "a=1&" * 20).status == 400


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET http://[x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xfc\xff/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /\r\nHost: localhost\r\n\r\n", 404),
    ],
)
def test_a_request_that_is_none(client: Client, sent: bytes, status: int) -> None:
    head, _, body = client.say(sent).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"Content-Security-Policy: default-src 'none'" in head
    assert set(json.loads(body)) == {"error"}
    assert client.ask("GET", "").status == 200


def test_so_many_requests_at_once_and_no_more() -> None:
    """The first MAX_THREADS are held; a further one is answered only when they are let go."""
    all_in, one_more, go = threading.Barrier(MAX_THREADS + 1), threading.Event(), threading.Event()
    entered = itertools.count(1)

    def hold(request: Request) -> Answer:
        if next(entered) > MAX_THREADS:
            one_more.set()
        else:
            all_in.wait(60)
            go.wait(60)
        return as_json(True)

    num_requests = 4 * MAX_THREADS
    with serving({("GET", "hold"): hold}) as client, ThreadPoolExecutor(num_requests) as pool:
        replies = [pool.submit(client.ask, "GET", "hold") for _ in range(num_requests)]
        all_in.wait(60)
        is_held = not one_more.wait(0.5)
        go.set()
        assert is_held
        assert [reply.result().status for reply in replies] == [200] * num_requests
    assert one_more.is_set()


def test_strangers_keep_nobody_waiting(client: Client) -> None:
    """Connections that say nothing or begin without an end, more than there are threads."""
    with ExitStack() as held:
        strangers = [held.enter_context(stranger(client)) for _ in range(MAX_STRANGERS + 1)]
        for connection, sent in zip(strangers[1:], itertools.cycle(["", "G", "GET /"])):
            connection.sendall(sent.encode())
        assert strangers[0].recv(1) == b""
        readable, _, _ = select.select(strangers[1:], [], [], 0)
        assert [strangers.index(each) for each in readable] == []
        assert client.ask("GET", "").status == 200


def test_a_head_has_to_come_in_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte it goes on for ever; who is answered already may take longer."""
    admitted, body_of = threading.Event(), Handler._body

    def noted(handler: Handler) -> bytes:
        admitted.set()
        return body_of(handler)

    monkeypatch.setattr(Handler, "_body", noted)
    monkeypatch.setattr(page_server, "HEAD_SECONDS", 0.2)
    with stranger(client) as silent, stranger(client) as slow:
        slow.settimeout(0.01)
        num_sent = 0
        while num_sent < 6000:
            try:
                slow.sendall(b"G")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                num_sent += 1
            except ConnectionError:
                break
        assert num_sent < 6000
        assert silent.recv(1) == b""
    monkeypatch.setattr(page_server, "HEAD_SECONDS", 1e6)
    with stranger(client) as known:
        lines = f"POST {client.server.folder}take HTTP/1.1\r\nHost: localhost\r\n"
        known.sendall((lines + "Origin: http://localhost\r\nContent-Length: 2\r\n\r\n1").encode())
        assert admitted.wait(60)
        monkeypatch.setattr(page_server, "HEAD_SECONDS", 0.0)
        known.settimeout(0.6)
        with pytest.raises(TimeoutError):
            known.recv(1)
        known.sendall(b"2")
        known.settimeout(60)
        assert known.recv(65536).startswith(b"HTTP/1.0 200 ")


def stranger(client: Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.port), timeout=60)


def test_a_port_that_is_taken() -> None:
    with PageServer(ROUTES, 0) as server, pytest.raises(UserError, match="give another with --por"):
        PageServer(ROUTES, server.server_port)
