"""The limits on the time of one picture."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.deadlines import deadline, seconds_without_core
from pipeline.pictures import PictureError


def spin() -> None:
    with deadline(0.05):
        while True:
            pass


def test_the_deadline_counts_processor_time() -> None:
    with deadline(0.05):
        threading.Event().wait(0.3)
    with pytest.raises(PictureError, match=r"took more than 0.05 s of processor time$"):
        spin()


def test_a_process_that_gets_no_core_is_known() -> None:
    """Two that want the same core, of which one has the lowest priority."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", "while True: pass"]
    hungry, patient = (subprocess.Popen(["taskset", "-c", str(core), *command]) for _ in range(2))
    try:
        os.setpriority(os.PRIO_PROCESS, patient.pid, 19)
        end = time.monotonic() + 60
        while seconds_without_core(patient.pid) < 0.5:
            assert time.monotonic() < end
    finally:
        for process in (hungry, patient):
            process.kill()
            process.wait()
