"""The end of a worker's process."""

from __future__ import annotations

import atexit
import signal
from functools import cache

EXIT_SECONDS = 30


@cache
def end_for_sure(seconds: int = EXIT_SECONDS) -> None:
    """This process is gone at most so long after it has begun to end.

    To Ray a worker is gone once it begins to. Native code that waits for ever when Python has
    ended (Arrow's threads and NCCL's are known for it) would keep its memory, and a GPU. The
    kernel's timer needs none of them.
    """
    atexit.register(signal.alarm, seconds)
