"""A worker that has begun to end does end, whatever waits in it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from pipeline import stages
from tests.builders import REPOSITORY

LINGERS = """
import atexit, threading
from pipeline.endings import end_for_sure
atexit.register(threading.Event().wait)  # called last: what is registered first is
end_for_sure(1)
end_for_sure(1)
"""
NOTHING: Any = None


def test_a_process_that_waits_at_its_end_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", LINGERS], cwd=REPOSITORY, timeout=240, check=False)
    assert done.returncode == -signal.SIGALRM


class Called(Exception):
    """Instead of a registration in this process."""


@pytest.mark.parametrize(
    "begin",
    [
        lambda: next(stages.read_stage(NOTHING, NOTHING, NOTHING)),
        lambda: next(stages.tile_stage(NOTHING, NOTHING, NOTHING)),
        lambda: stages.write_stage(NOTHING, NOTHING),
        lambda: stages.finalize_stage(NOTHING, NOTHING),
    ],
    ids=["read", "tile", "write", "finalize"],
)
def test_each_stage_sees_to_the_end_of_its_worker(
    begin: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def called() -> NoReturn:
        raise Called

    monkeypatch.setattr(stages, "end_for_sure", called)
    with pytest.raises(Called):
        begin()
