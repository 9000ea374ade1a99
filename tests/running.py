"""Real jobs in processes of their own, to be killed while they run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.builders import cli_env, files_below, picture, write_tar

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they live a minute longer
ENDLESS_PICTURES = 20_000  # minutes of work, even alone on a quick machine
PATIENCE_SECONDS = 600.0  # a loaded machine is late, and not wrong


@contextmanager
def started_cli(
    *arguments: object, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, and its driver gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=cli_env(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


@contextmanager
def endless_shard(folder: Path) -> Iterator[None]:
    """One more shard, the last by name: a job whose input has it does not end by itself."""
    data = picture(60, 60)
    shard = write_tar(folder / "~.tar", ((f"{n:05}.jpg", data) for n in range(ENDLESS_PICTURES)))
    try:
        yield
    finally:
        shard.unlink()


def commits_below(output: Path) -> dict[str, bytes]:
    """Name -> content of each commit that is published."""
    return {path.name: path.read_bytes() for path in sorted((output / "commits").glob("*.json"))}


def is_worker(process: psutil.Process) -> bool:
    """A process of Ray that runs tasks, and still lives."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline())
        return title.startswith("ray::") and not title.startswith(AGENTS)
    return False


def wait_for_workers(tree: Sequence[psutil.Process]) -> None:
    """Until the workers of a killed driver have heard of its end they go on with what they were
    at."""
    assert not still_alive([process for process in tree if is_worker(process)])


def still_alive(
    processes: Sequence[psutil.Process], seconds: float = PATIENCE_SECONDS
) -> list[psutil.Process]:
    """Those that have not ended after so long. psutil's own wait raises where one is reaped in the
    moment in which it looks."""
    never, alive = threading.Event(), list(processes)
    for _ in range(int(seconds / 0.1)):
        alive = [process for process in alive if _lives(process)]
        if not alive:
            break
        never.wait(0.1)
    return alive


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def strike(processes: Sequence[psutil.Process], signum: signal.Signals) -> None:
    """A signal to each that still lives."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def wait_until(
    process: subprocess.Popen[bytes], condition: Callable[[], object], *, may_end: bool = False
) -> None:
    """Until a running job has come so far. One that ends before is an error, with what it said."""
    for _ in range(int(PATIENCE_SECONDS / 0.05)):
        if condition():
            return
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        if may_end or condition():
            return
        raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]!r}")
    raise AssertionError("the job never came so far")


def comparable(output: Path) -> dict[str, bytes]:
    """Every file as it is; of a commit, all but when, how fast and by whom."""
    return without_times(files_below(output))


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files or objects of an OUTPUT; of a commit, all but when, how fast and by whom."""
    same = dict(files)
    for name, data in files.items():
        if name.startswith("commits/"):
            commit = json.loads(data)
            del commit["seconds"], commit["committed_at"], commit["replicas"]
            same[name] = json.dumps(commit).encode()
    return same
