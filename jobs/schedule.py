"""`tessera schedule`: runs `reindex` on a timetable, one run at a time, as jobs of a Ray cluster.

The process only waits, submits and writes its history; it may be ended and started at any time.
A run that goes on meanwhile is found again by its id; times that were missed are made up by one.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from jobs.ray_jobs import (
    AWAY,
    Cluster,
    Job,
    KnownJobError,
    UnknownJobError,
    UnreachableError,
    connect,
)
from jobs.schedule_history import LOST, NOT_SUBMITTED, End, History, Run, Start, held_history
from jobs.submission import Submission, prepare
from jobs.submit import Place, submit
from jobs.terminal import BrokenRunError
from jobs.timetable import Timetable
from model.errors import UserError
from pipeline.printable import printable

LOOK_SECONDS = 10.0  # between two looks at a run that goes on
LOG_LOOKS = 3  # at the log of a run that is over, before its summary is given up
NAP_SECONDS = 60.0  # longest wait at once: a clock that is set, or a laptop that slept, is noticed
DAY = timedelta(days=1)
UNSURE = (*AWAY, BrokenRunError, UnreachableError)  # what tells nothing of what the cluster did
TROUBLES = (*UNSURE, UserError)


class Clock(Protocol):
    """Time, and the wish to end."""

    def now(self) -> datetime: ...

    def wait(self, seconds: float) -> bool:
        """Gives whether the schedule is to end."""
        ...

    def ended(self) -> bool:
        """Whether the schedule is to end."""
        ...


class Runner(Protocol):
    """Where runs run."""

    def submit(self, run: str) -> None: ...

    def job(self, run: str) -> Job: ...

    def log(self, run: str) -> str: ...


class RayRunner:
    """Runs as jobs of the cluster at `address`. What the arguments name is read anew each time."""

    def __init__(self, address: str | None, arguments: list[str], place: Place) -> None:
        if arguments[:1] == ["reindex"]:
            arguments = arguments[1:]
        if not arguments:
            raise UserError("nothing to run: tessera schedule --cron … -- INPUT OUTPUT --model M …")
        self._address, self._place = address, place
        self._arguments = ["reindex", *([] if "--json" in arguments else ["--json"]), *arguments]
        self._found: Cluster | None = None
        self._prepare()  # a mistake is told now, not at night

    def _prepare(self) -> Submission:
        return prepare(self._arguments, ("reindex",))

    @property
    def _cluster(self) -> Cluster:
        if self._found is None:
            self._found = connect(self._address)
        return self._found

    def submit(self, run: str) -> None:
        submit(self._cluster, self._prepare(), self._place, run)

    def job(self, run: str) -> Job:
        return self._cluster.job(run)

    def log(self, run: str) -> str:
        return self._cluster.log(run)


@dataclass
class Schedule:
    """A timetable, its history, and where its runs run."""

    timetable: Timetable
    history: History
    runner: Runner
    clock: Clock
    tell: Callable[[str], object]
    _unsure: str = ""  # the run that the cluster may not have been given yet
    _trouble: str = ""  # the last that was said of a submission
    _set_back: datetime | None = None  # when the history was found to be ahead of the clock

    def run(self) -> None:
        """Until the clock says that it is to end. A run that goes on then is left to go on."""
        began = self.clock.now()
        while True:
            last = self.history.runs[-1] if self.history.runs else None
            if last is not None and last.end is None:
                if not self._watch(last.start.run):
                    return
                continue
            since = self._since(began)
            due = self.timetable.missed(since, self.clock.now())
            if due is not None:
                if self.clock.ended():  # told so during the last look at a run
                    return
                self._fire(due)
                continue
            left = (self.timetable.after(since) - self.clock.now()).total_seconds()
            if self.clock.wait(max(0.0, min(left, NAP_SECONDS))):
                return

    def _since(self, began: datetime) -> datetime:
        """The last time that has had its run; a new schedule owes nothing for what was before it.

        A run that was lost is made up once: a second one lost for the same time waits for the next.
        Where the clock was ahead for a time, and runs with it, what is due from now on counts.
        """
        runs = self.history.runs
        if not runs:
            return began
        last = runs[-1]
        if last.start.due - self.clock.now() > DAY:
            if self._set_back is None:
                self._set_back = self.clock.now()
                self.tell(
                    f"the last run of the history was due {last.start.due:%Y-%m-%d %H:%M} UTC, "
                    "which is to come: the clock was set back, and the timetable begins anew"
                )
            return self._set_back
        self._set_back = None
        assert last.end is not None
        lost = [run for run in runs if run.start.due == last.start.due and _lost(run)]
        owed = _lost(last) and len(lost) == 1
        return last.start.due - timedelta(minutes=1) if owed else last.start.due

    def _fire(self, due: datetime) -> None:
        run = f"reindex-{due:%Y%m%dT%H%M}-{secrets.token_hex(3)}"
        self.history.append(Start(run=run, due=due, at=self.clock.now()))
        self.tell(f"{run}: due {due:%Y-%m-%d %H:%M} UTC")
        self._unsure = run
        self._submit(run)

    def _submit(self, run: str) -> None:
        """Hands a run to the cluster. Where no answer comes the cluster may have taken it all the
        same: it is given it again, under the same id, until it says so."""
        try:
            self.runner.submit(run)
            self._unsure = self._trouble = ""
        except KnownJobError:  # an earlier attempt came through
            self._unsure = ""
        except UNSURE as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                self.tell(
                    f"{run}: {error or type(error).__name__}; submitted again until it is taken"
                )
        except UserError as error:
            self._unsure = ""
            self._end(run, NOT_SUBMITTED, 1, message=str(error))

    def _watch(self, run: str) -> bool:
        """Waits until a run is over, and writes how it ended; False: the schedule is to end."""
        trouble = ""
        while True:
            try:
                job = self.runner.job(run)
                if job.over:
                    return self._finish(job)
                trouble, self._unsure = "", ""
            except UnknownJobError as error:
                if self._unsure != run:
                    self._end(run, LOST, 1, message=str(error))
                    return True
                self._submit(run)
                if self.history.runs[-1].end is not None:
                    return True
            except TROUBLES as error:
                if trouble != str(error):
                    trouble = str(error)
                    self.tell(f"{run}: {trouble or type(error).__name__}; trying again")
            if self.clock.wait(LOOK_SECONDS):
                return False

    def _finish(self, job: Job) -> bool:
        """Writes how a job ended; False: the schedule is to end, and the next start writes it.

        Its log may be gone with its node, or not be had for a moment: it is asked for a few times.
        """
        changed, message = None, ""
        for look in range(LOG_LOOKS):
            if look and self.clock.wait(LOOK_SECONDS):
                return False
            try:
                changed, message = last_document(self.runner.log(job.id)), ""
                break
            except TROUBLES as error:
                message = f"its log cannot be read: {error or type(error).__name__}"
        self._end(job.id, job.status, job.exit_status, changed, message)
        return True

    def _end(
        self,
        run: str,
        status: str,
        exit_status: int,
        changed: dict[str, Any] | None = None,
        message: str = "",
    ) -> None:
        at = self.clock.now()
        self.history.append(
            End(run=run, at=at, status=status, exit=exit_status, changed=changed, message=message)
        )
        self.tell(f"{run}: {describe_end(self.history.runs[-1])}")


def _lost(run: Run) -> bool:
    return run.end is not None and run.end.status == LOST


def last_document(log: str) -> dict[str, Any] | None:
    """The last JSON object that starts and ends a line of a job's log: its command's summary, for
    a job's stdout and stderr are one log."""
    lines = log.splitlines()
    for end in range(len(lines) - 1, -1, -1):
        if lines[end] != "}":
            continue
        for begin in range(end, -1, -1):
            if lines[begin] != "{":
                continue
            try:
                found = json.loads("\n".join(lines[begin : end + 1]))
            except ValueError:
                break  # something else was printed in between
            assert isinstance(found, dict)
            return found
    return None


def describe_end(run: Run) -> str:
    """How a run ended, on one line."""
    if run.end is None:
        return "goes on"
    plain = run.end.changed or {}
    counts = [f"{k} {v}" for k, v in plain.items() if isinstance(v, int | float | str)]
    said = ", ".join(counts) or run.end.message or "no summary"
    return printable(f"{run.end.status}, exit {run.end.exit}: {said}")


def show_history(runs: Sequence[Run], as_json: bool) -> None:
    """The history on stdout, the oldest run first."""
    if as_json:
        print(json.dumps([run.model_dump(mode="json") for run in runs], indent=1))
        return
    for run in runs:
        end = f"{run.end.at:%Y-%m-%d %H:%M:%S}" if run.end else "…"
        print(f"{run.start.at:%Y-%m-%d %H:%M:%S}  {end:19}  {run.start.run}  {describe_end(run)}")
    if not runs:
        print("no runs yet", file=sys.stderr)


class WallClock:
    """The real one; SIGTERM and Ctrl-C end the schedule."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def _end(self, signum: int, frame: FrameType | None) -> None:
        self._ended.set()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def ended(self) -> bool:
        return self._ended.is_set()


def run_schedule(
    timetable: Timetable, file: Path, address: str | None, arguments: list[str], place: Place
) -> None:
    """Runs until SIGTERM or Ctrl-C.

    Raises:
        UserError: the arguments are wrong, or another schedule holds the history.
    """
    runner = RayRunner(address, arguments, place)
    with held_history(file) as history:
        clock = WallClock()

        def tell(line: str) -> None:
            print(f"{clock.now():%Y-%m-%d %H:%M:%S} {printable(line)}", file=sys.stderr, flush=True)

        tell(f"next run {timetable.after(clock.now()):%Y-%m-%d %H:%M} UTC")
        Schedule(timetable, history, runner, clock, tell).run()
        tell("ended; a run that goes on is found again by the next start")
