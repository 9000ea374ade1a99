"""Debian's Prometheus with the file that Ray writes for it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.ray_head import free_ports

LOOK_SECONDS = 0.2


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
        document = answer.json()
        assert document["status"] == "success", (query, document)
        return document["data"]

    def query(self, expression: str) -> list[Series]:
        found = self.get("query", query=expression)["result"]
        return [Series(one["metric"], float(one["value"][1])) for one in found]

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Looks again and again; the server itself keeps the time."""
        for _ in range(int(seconds / LOOK_SECONDS)):
            if condition():
                return
            try:
                self.process.wait(LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            break
        raise AssertionError(f"never {what}")


@contextmanager
def prometheus(session: Path, port: int | None = None) -> Iterator[Prometheus]:
    """Watches the Ray session whose folder it is given. Fails, never skips, where it is missing:
    who asks for it wants its answer."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("prometheus is not installed (Debian: apt-get install prometheus)")
    port = port or free_ports(1)[0]
    with tempfile.TemporaryDirectory(prefix="prometheus-") as folder:
        command = [
            program,
            f"--config.file={session}/metrics/prometheus/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        server = Prometheus(f"http://127.0.0.1:{port}", process)
        try:
            server.wait_until(lambda: _is_ready(server.url), "ready")
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False
