"""Processes found by their titles, and killed when they are surely at that work.

Ray names a worker's process for the task that it runs now (`ray::MapBatches(read_stage)`).
Everything the suite starts stays below the suite's own process, orphans included, because it is
their subreaper: no other process is ever touched, and what is left at the end is known exactly.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """From now on a process whose parent dies becomes a child of this one."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(pid: int) -> list[psutil.Process]:
    """All that run below a process; dead ones that nobody has waited for are not among them."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def reap_raylets() -> None:
    """Waits for dead raylets, as whoever starts one does: Ray's idle workers end when their raylet
    is no process any more, and one that nobody has waited for still is."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, 0)


def title(pid: int) -> str:
    """The command line, or what the process has put in its place; empty when it is gone."""
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return line.replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def is_below(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` has started the process, or one that did."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        pid = int(stat.rpartition(b")")[2].split()[1])
    return False


def at_work(words: str) -> list[int]:
    """Our processes with these words in their titles; quick, for short tasks are to be caught."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return sorted(p for p in pids if words in title(p) and is_below(p, os.getpid()))


def kill_at_work(pid: int, words: str) -> str | None:
    """SIGKILL if it is still at that work, for it is stopped first and looked at again.

    Gives its title, or None where it had gone on to something else.
    """
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        said = title(pid)
        os.kill(pid, signal.SIGKILL if words in said else signal.SIGCONT)
        return said if words in said else None
    return None


def kill_all(processes: list[psutil.Process]) -> None:
    """Stops all of them, so that none can react to the death of another, and kills them."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)
