"""A victim is one of ours, and dies only while it is at the work that is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chaos.processes import at_work, is_below, kill_at_work, reap_raylets

WORK = "tessera-chaos-at-this-work"


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_only_ours_are_found(worker: subprocess.Popen[bytes]) -> None:
    assert at_work(WORK) == [worker.pid]
    assert is_below(worker.pid, os.getpid())
    assert not is_below(os.getpid(), worker.pid)
    assert not is_below(1, os.getpid())


def test_who_has_gone_on_to_other_work_lives(worker: subprocess.Popen[bytes]) -> None:
    assert kill_at_work(worker.pid, "some other work") is None
    assert psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED
    assert WORK in (kill_at_work(worker.pid, WORK) or "")
    assert worker.wait(timeout=10) == -signal.SIGKILL
    assert kill_at_work(worker.pid, WORK) is None


def test_a_dead_raylet_is_no_process_any_more(tmp_path: Path) -> None:
    """Another child is its owner's to wait for."""
    true = shutil.which("true")
    assert true is not None
    children = []
    for name in ("raylet", "other"):
        (tmp_path / name).symlink_to(true)
        children.append(os.posix_spawn(str(tmp_path / name), [name], {}))
        os.waitid(os.P_PID, children[-1], os.WEXITED | os.WNOWAIT)
    raylet, other = children
    reap_raylets()
    assert not psutil.pid_exists(raylet)
    assert os.waitpid(other, 0) == (other, 0)
