"""Tells how far a job is: a bar on a terminal, a line every ten seconds in a log, a record for
`tessera status`."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from datetime import UTC, datetime
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.terminal import clock
from pipeline.commits import RUNS
from pipeline.commits import Progress as ProgressRecord
from pipeline.dataflow import Tally
from pipeline.storage import Storage, join

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
RECORD_SECONDS = 10.0
RECORDED_FAILURES = 1000  # about 200 KiB of them
WINDOW_SECONDS = 30.0  # tiles/s is the rate over the last half minute


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Reporter:
    """Shows a run while it goes on; a context manager."""

    def __init__(self, output: str, run: str, storage: Storage) -> None:
        self._url = join(output, RUNS, run, "progress.json")
        self._storage = storage
        self._started_at = now()
        self._began = time.monotonic()
        self._window: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._next_line = self._began + LINE_SECONDS
        self._next_record = self._began
        self._bar: Progress | None = None

    def __enter__(self) -> Reporter:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("shards"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._bar.add_task("", total=None, line="starting Ray")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tick(self, tally: Tally) -> None:
        """Called often; writes as often as is useful."""
        moment = time.monotonic()
        self._window.append((moment, tally.tiles))
        while self._window[0][0] < moment - WINDOW_SECONDS and len(self._window) > 2:
            self._window.popleft()
        if self._bar is not None:
            done = tally.committed + len(tally.failures)
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=done, total=tally.shards, line=self._line(tally))
        elif moment >= self._next_line:
            self._next_line = moment + LINE_SECONDS
            done = tally.committed + len(tally.failures)
            print(f"shards {done}/{tally.shards}, {self._line(tally)}", file=sys.stderr, flush=True)
        if moment >= self._next_record:
            self._next_record = moment + RECORD_SECONDS
            self.record(tally, ended=False)

    def record(self, tally: Tally, ended: bool) -> None:
        record = ProgressRecord(
            started_at=self._started_at,
            updated_at=now(),
            ended=ended,
            shards=tally.shards,
            committed=tally.committed,
            failures=tuple(tally.failures[:RECORDED_FAILURES]),
            more_failures=max(0, len(tally.failures) - RECORDED_FAILURES),
            tiles=tally.tiles,
            rejects=tally.rejects.total(),
            tiles_per_second=round(self._rate(), 2),
        )
        try:
            self._storage.publish_bytes(self._url, record.dump())
        except OSError as error:  # a full disk fails the shards that need it, not the whole job
            logger.warning("%s; `tessera status` will not know how far this run is", error)

    def _rate(self) -> float:
        (then, before), (moment, tiles) = self._window[0], self._window[-1]
        return (tiles - before) / (moment - then) if moment > then else 0.0

    def _line(self, tally: Tally) -> str:
        done = tally.committed + len(tally.failures)
        left = "?"
        if done:
            left = clock(self.seconds() / done * (tally.shards - done))
        line = (
            f"{self._rate():.1f} tiles/s, {tally.tiles} tiles, "
            f"{tally.rejects.total()} rejects, time left {left}"
        )
        return f"{line}, {len(tally.failures)} failed" if tally.failures else line
