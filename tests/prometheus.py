"""Debian's Prometheus with the file that Ray writes for it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.ports import free_ports

LOOK_SECONDS = 0.2
ATTEMPTS = 3  # another may have bound our port in between


@dataclass(frozen=True)
class Series:
    """One answer of a query: its labels and its value."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str, **query: str | float) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=query, timeout=10)
        answer.raise_for_status()
        document = answer.json()
        assert document["status"] == "success", (query, document)
        return document["data"]

    def query(self, expression: str) -> list[Series]:
        found = self.get("query", query=expression)["result"]
        return [Series(one["metric"], float(one["value"][1])) for one in found]

    def is_ready(self) -> bool:
        return requests.get(f"{self.url}/-/ready", timeout=10).ok

    def comes_to(self, condition: Callable[[], bool], seconds: float = 150) -> bool:
        """Looks again and again; the server itself keeps the time. No answer is a no."""
        for _ in range(int(seconds / LOOK_SECONDS)):
            with suppress(requests.RequestException):
                if condition():
                    return True
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LOOK_SECONDS)
                return False
        return False

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 150) -> None:
        assert self.comes_to(condition, seconds), f"never {what}"


@contextmanager
def prometheus(session: Path, port: int | None = None) -> Iterator[Prometheus]:
    """Watches the Ray session whose folder it is given. Fails, never skips, where it is missing:
    who asks for it wants its answer."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("prometheus is not installed (Debian: apt-get install prometheus)")
    said = ""
    for _ in range(ATTEMPTS):
        with _started(program, session, port or free_ports(1)[0]) as (server, log):
            if server.comes_to(server.is_ready):
                yield server
                return
            said = log.read_text()
    raise AssertionError(f"never ready:\n{said[-3000:]}")


@contextmanager
def _started(program: str, session: Path, port: int) -> Iterator[tuple[Prometheus, Path]]:
    with tempfile.TemporaryDirectory(prefix="prometheus-") as folder:
        command = [
            program,
            f"--config.file={session}/metrics/prometheus/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            yield Prometheus(f"http://127.0.0.1:{port}", process), log
        finally:
            process.terminate()
            process.wait(timeout=120)
