"""A Ray head as an operator starts it, token on, with ports and a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from tests.ports import free_ports
from tests.running import still_alive, strike

ATTEMPTS = 3  # another may have bound a port of ours in between
START_SECONDS = 300


@dataclass(frozen=True)
class Head:
    """A running head. `env` is what a client of it needs; `address` is RAY_ADDRESS of a driver."""

    url: str
    env: dict[str, str]
    folder: Path
    address: str


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Head]:
    """A head with its dashboard on loopback, ended by its process id."""
    said = ""
    for _ in range(ATTEMPTS):
        with _started(num_cpus) as (process, head, agent):
            if _answers(process, head, agent):
                yield head
                return
            said = (head.folder / "head.log").read_text()
    raise AssertionError(f"the head never answered:\n{said[-3000:]}")


@contextmanager
def _started(num_cpus: int) -> Iterator[tuple[subprocess.Popen[bytes], Head, int]]:
    token = secrets.token_hex(32)
    gcs, dashboard, agent, client, metrics = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="tes-head-", dir="/tmp"))  # sockets want short paths
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    env = {
        **bare,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs start `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_SECONDS),
        "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(START_SECONDS),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={num_cpus}",
        "--object-store-memory=300000000", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        auth = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
        yield process, Head(url, auth, folder, f"127.0.0.1:{gcs}"), agent
    finally:
        _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(process: subprocess.Popen[bytes], head: Head, agent: int) -> bool:
    """Waits for the jobs API, and for the agent that starts jobs; False where the head has ended,
    or is silent for too long."""
    headers = {"Authorization": f"Bearer {head.env['RAY_AUTH_TOKEN']}"}
    asked = f"{head.url}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with suppress(requests.RequestException):
            if all(requests.get(url, headers=headers, timeout=10).ok for url in asked):
                return True
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    started = [process.pid] if process.poll() is None else []
    children = psutil.Process(process.pid).children(recursive=True) if started else []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    strike(still_alive(children, seconds=5), signal.SIGKILL)
