"""Child processes that run a module of ours and do not outlive their parent."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_child(module: str, job: dict[str, Any], **how: Any) -> subprocess.Popen[bytes]:
    """Runs `python -m module JOB` with this process's import path; `how` goes to `Popen`.

    Raises:
        OSError: no process starts.
    """
    return subprocess.Popen(  # noqa: S603 this interpreter and our own module
        # -P: whatever lies in the current folder is not ours
        [sys.executable, "-P", "-m", module, json.dumps({**job, "parent": os.getpid()})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **how,
    )


def job_of_child() -> dict[str, Any]:
    """What the parent gave this process, which from here on is killed when the parent ends.

    To the kernel the parent is the thread that started it: that thread must live as long.
    """
    job: dict[str, Any] = json.loads(sys.argv[1])
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != job["parent"]:
        sys.exit()  # it died before the call above
    return job
