"""The history of a schedule: what was started when, and how it ended. One JSON line an event."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from jobs.terminal import BrokenRunError
from model.errors import UserError

LOST = "LOST"  # its cluster knows nothing of it: it was never submitted, or the cluster is gone
NOT_SUBMITTED = "NOT_SUBMITTED"


class Start(BaseModel):
    """A run is about to be submitted. Written before it is, so that no run is ever unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: Literal["start"] = "start"
    run: str  # the id of its job
    due: datetime  # the time of the timetable it stands for
    at: datetime


class End(BaseModel):
    """A run is over. `changed` is the summary that its command printed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: Literal["end"] = "end"
    run: str
    at: datetime
    status: str  # Ray's word for how it ended, or one of the two above
    exit: int
    changed: dict[str, Any] | None = None
    message: str = ""


Event = Annotated[Start | End, Field(discriminator="event")]
EVENT: TypeAdapter[Start | End] = TypeAdapter(Event)


class Run(BaseModel):
    """Both events of a run; `end` is None while it goes on."""

    start: Start
    end: End | None


def read_history(file: Path) -> list[Run]:
    """The runs of a history, the oldest first. A last line without its end is none: its writer died
    while it wrote.

    Raises:
        UserError: it cannot be read, or is no history.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    runs: dict[str, Run] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            event = EVENT.validate_json(line)
        except ValidationError as error:
            raise UserError(f"{file}: line {number} is no event of a schedule") from error
        if isinstance(event, Start):
            runs[event.run] = Run(start=event, end=None)
        elif event.run in runs:
            runs[event.run] = Run(start=runs[event.run].start, end=event)
        else:
            raise UserError(f"{file}: line {number} ends a run that did not start: {event.run}")
    return list(runs.values())


class History:
    """The history of the schedule that runs now, and holds the file."""

    def __init__(self, file: Path, descriptor: int, runs: Sequence[Run]) -> None:
        self._file = file
        self._descriptor = descriptor
        self.runs = list(runs)

    def append(self, event: Start | End) -> None:
        """Whole on disk when it returns.

        Raises:
            BrokenRunError: the disk does not take it; the file is as it was.
        """
        line = event.model_dump_json().encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise BrokenRunError(f"{self._file}: cannot be written: {error.strerror}") from error
        if isinstance(event, Start):
            self.runs.append(Run(start=event, end=None))
        else:
            self.runs[-1] = Run(start=self.runs[-1].start, end=event)


@contextmanager
def held_history(file: Path) -> Iterator[History]:
    """The file for one schedule alone. Half a line that a dead one left is cut off.

    Raises:
        UserError: another schedule holds it, or it cannot be written.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{file}: another schedule writes it; end that one, or give --history another file"
            ) from error
        runs = read_history(file)
        os.ftruncate(descriptor, file.read_bytes().rfind(b"\n") + 1)
        yield History(file, descriptor, runs)
    finally:
        os.close(descriptor)
