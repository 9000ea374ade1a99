"""Real jobs in processes of their own, to be killed while they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.builders import cli_env, files_below


@contextmanager
def started_cli(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, and its driver gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=cli_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(process: subprocess.Popen[bytes], condition: object, seconds: float = 90) -> None:
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
