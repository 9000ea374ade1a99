"""Real jobs in processes of their own, to be killed while they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.builders import cli_env, files_below, picture, write_tar

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they live a minute longer
ENDLESS_PICTURES = 20_000  # minutes of work, even alone on a quick machine


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
    workers = [process for process in tree if is_worker(process)]
    assert not psutil.wait_procs(workers, timeout=180)[1]


def wait_until(process: subprocess.Popen[bytes], condition: object, seconds: float = 240) -> None:
    assert callable(condition)
    for _ in range(int(seconds / 0.05)):
        if condition() or process.poll() is not None:
            return
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
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
