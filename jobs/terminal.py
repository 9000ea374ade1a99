"""stderr as a user sees it: this program's lines and its workers', not those of Ray's native code.

Ray's C++ core writes errors about its own insides ("Actor … has constructor arguments in the object
store") to descriptor 2 of the driver. No setting keeps them to its log file: RAY_BACKEND_LOG_LEVEL
adds a line of its own for every process.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pipeline.printable import printable


class BrokenRunError(Exception):
    """The cluster failed while a job ran. One line; what is committed stays."""


class OneLine(logging.Formatter):
    """What a message repeats from data or storages cannot forge a line or command a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


_claimed = False


def claim_stderr() -> None:
    """Lets this process print to another descriptor than 2. To be called before anything prints."""
    global _claimed
    shown = os.dup(sys.stderr.fileno())
    sys.stderr = os.fdopen(
        shown, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )
    _claimed = True


def divert_native_stderr(file: Path) -> None:
    """Sends what is written to descriptor 2 itself to a file, where stderr has been claimed."""
    if _claimed:
        with file.open("ab") as sink:
            os.dup2(sink.fileno(), 2)
