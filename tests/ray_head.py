"""A Ray head as an operator starts it, token on, with ports and a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests


@dataclass(frozen=True)
class Head:
    """A running head. `env` is what a client of it needs."""

    url: str
    env: dict[str, str]
    folder: Path


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Head]:
    """A head with its dashboard on loopback, ended by its process id."""
    token = secrets.token_hex(32)
    gcs, dashboard, agent, client, metrics = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="tes-head-", dir="/tmp"))  # sockets want short paths
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    env = {
        **bare,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs start `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
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
        _wait_for_jobs_api(process, url, token, folder / "head.log")
        yield Head(url, {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}, folder)
    finally:
        _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs_api(
    process: subprocess.Popen[bytes], url: str, token: str, log: Path, seconds: float = 60
) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    for _ in range(int(seconds / 0.2)):
        try:
            if requests.get(f"{url}/api/jobs/", headers=headers, timeout=10).ok:
                return
        except requests.RequestException:
            pass
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the head never answered:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    started = [process.pid] if process.poll() is None else []
    children = psutil.Process(process.pid).children(recursive=True) if started else []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
