"""A schedule whose clock is stepped: `python -m tests.stepped_schedule URL HISTORY ARGUMENTS...`

Real jobs on a real head; half hours pass at once. After each run it waits for a line on stdin, and
ends when there is none.
"""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from jobs.schedule import LOOK_SECONDS, RayRunner, Schedule
from jobs.schedule_history import held_history
from jobs.submit import Place
from jobs.timetable import Timetable

REAL_LOOK_SECONDS = 0.5


class SteppedClock:
    """Time passes where a due time is waited for. A look at a run takes none of it: however slow
    the machine is, no due time goes by meanwhile."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 11, 24, 12, 1, tzinfo=UTC)
        self.told_to_end = False

    def now(self) -> datetime:
        return self.moment

    def wait(self, seconds: float) -> bool:
        if seconds == LOOK_SECONDS:
            threading.Event().wait(REAL_LOOK_SECONDS)
        else:
            self.moment += timedelta(seconds=seconds)
        return self.told_to_end

    def ended(self) -> bool:
        return self.told_to_end


def main() -> None:
    url, history, *arguments = sys.argv[1:]
    clock = SteppedClock()

    def tell(line: str) -> None:
        print(line, flush=True)
        if ", exit " in line:
            clock.told_to_end = not sys.stdin.readline()

    runner = RayRunner(url, arguments, Place())
    with held_history(Path(history)) as held:
        Schedule(Timetable.parse("*/30 * * * *", "UTC"), held, runner, clock, tell).run()


if __name__ == "__main__":
    main()
