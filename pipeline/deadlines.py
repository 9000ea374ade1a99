"""Two limits on the time of one picture: one that Python can raise, one that ends the process.

The first comes between two Python instructions, so it cannot interrupt a decoder that hangs in one
call. The second needs neither the interpreter nor its lock. It ends the process; Ray then repeats
the group, and `pipeline.isolation` finds the picture.

A picture becomes a reject by the time that it used, not by the time that it waited for a core: the
processes that tile have the lowest priority, and on a busy machine they get a hundredth of one.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.pictures import PictureError

STDERR = 2


def hard_seconds(deadline_seconds: float) -> float:
    """What is still at it then does not come back by itself."""
    return 2 * deadline_seconds + 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends a picture that takes more processor time, between two Python instructions.

    Raises:
        PictureError: code `deadline`.
    """
    # Signals reach the main thread only; Ray runs tasks there.
    assert threading.current_thread() is threading.main_thread()

    def expire(signum: int, frame: FrameType | None) -> None:
        raise PictureError("decode", "deadline", f"took more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def seconds_without_core(pid: int) -> float:
    """How long the main thread of a process was ready to run and had no core to run on.

    The kernel says it in `/proc/PID/schedstat` (Documentation/scheduler/sched-stats.rst); 0 where
    it was built without.
    """
    schedstat = Path(f"/proc/{pid}/schedstat")
    return int(schedstat.read_text().split()[1]) / 1e9 if schedstat.exists() else 0.0


class HardLimit:
    """Ends this process, with a traceback on stderr, `seconds` after the last `renew` but a few.

    Arming starts a thread, which takes a tenth of a millisecond: it is done again only once a
    quarter of the time has gone. So a picture has at least three quarters of it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._armed: float | None = None

    def renew(self) -> None:
        now = time.monotonic()
        if self._armed is None or now - self._armed > self._seconds / 4:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=STDERR)
            self._armed = now

    def cancel(self) -> None:
        """To be called before anything that may take long for other reasons."""
        faulthandler.cancel_dump_traceback_later()
        self._armed = None
