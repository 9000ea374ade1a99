"""Runs on a timetable: one at a time, missed ones made up once, found again after a restart."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.ray_jobs import Job, KnownJobError, UnknownJobError, UnreachableError
from jobs.schedule import RayRunner, Schedule, last_document, show_history
from jobs.schedule_history import LOST, NOT_SUBMITTED, Run, held_history, read_history
from jobs.submit import Place
from jobs.terminal import BrokenRunError
from jobs.timetable import Timetable
from model.errors import UserError
from tests.builders import cli_env

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
SUMMARY = {"new": 1, "unchanged": 2}


@dataclass
class FakeClock:
    """Time passes only where it is waited for; `end` is when the schedule is told to end."""

    moment: datetime
    end: datetime
    waited: list[float] = field(default_factory=list)

    def now(self) -> datetime:
        return self.moment

    def wait(self, seconds: float) -> bool:
        assert seconds > 0, "it would turn on the spot"
        self.waited.append(seconds)
        self.moment += timedelta(seconds=seconds)
        return self.ended()

    def ended(self) -> bool:
        return self.moment >= self.end


@dataclass
class FakeRunner:
    """Jobs that take some minutes each; `fail` may raise at submission, or lose a job."""

    clock: FakeClock
    minutes: float = 5.0
    fail: Callable[[str], None] = lambda run: None
    begun: dict[str, datetime] = field(default_factory=dict)
    at_once: int = 0

    def submit(self, run: str) -> None:
        self.fail(run)
        if run in self.begun:
            raise KnownJobError(f"job {run}: the cluster has one of that id already")
        going_on = [r for r in self.begun if not self._is_over(r)]
        self.at_once = max(self.at_once, 1 + len(going_on))
        self.begun[run] = self.clock.now()

    def job(self, run: str) -> Job:
        if run not in self.begun:
            raise UnknownJobError(f"job {run}: unknown")
        return Job(run, "SUCCEEDED" if self._is_over(run) else "RUNNING", "", "", {}, 1.0, None, 0)

    def _is_over(self, run: str) -> bool:
        return self.clock.now() >= self.begun[run] + timedelta(minutes=self.minutes)

    def log(self, run: str) -> str:
        return f"a line\n{json.dumps(SUMMARY, indent=1)}\nthe end\n"


@dataclass
class Bench:
    """One schedule, started and ended as often as a test likes."""

    file: Path
    clock: FakeClock
    runner: FakeRunner
    said: list[str] = field(default_factory=list)

    def run(self, minutes: float, expression: str = "*/30 * * * *") -> list[Run]:
        self.clock.end = self.clock.moment + timedelta(minutes=minutes)
        with held_history(self.file) as history:
            table = Timetable.parse(expression, "UTC")
            Schedule(table, history, self.runner, self.clock, self.said.append).run()
        return read_history(self.file)

    def dues(self) -> list[float]:
        return [(run.start.due - NOON) / timedelta(minutes=1) for run in read_history(self.file)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    clock = FakeClock(NOON + timedelta(minutes=1), NOON)
    return Bench(tmp_path / "history.jsonl", clock, FakeRunner(clock))


def test_runs_are_on_time_and_their_ends_are_known(bench: Bench) -> None:
    runs = bench.run(100)
    assert bench.dues() == [30, 60, 90]
    for run in runs:
        assert run.end is not None
        assert run.start.at == run.start.due
        assert run.end.at == run.start.at + timedelta(minutes=5)
        assert (run.end.status, run.end.exit, run.end.changed) == ("SUCCEEDED", 0, SUMMARY)
    assert list(bench.runner.begun) == [run.start.run for run in runs]


def test_runs_longer_than_their_period_do_not_overlap(bench: Bench) -> None:
    bench.runner.minutes = 70
    bench.run(220)
    assert bench.dues() == [30, 90, 150], "60 and 120 passed during a run too"
    assert bench.runner.at_once == 1


def test_missed_runs_are_made_up_once_after_a_restart(bench: Bench) -> None:
    bench.run(40)
    assert bench.dues() == [30]
    bench.clock.moment = NOON + timedelta(minutes=305)
    bench.run(10)
    assert bench.dues() == [30, 300], "nine were missed"
    bench.run(30)
    assert bench.dues() == [30, 300, 330]


def test_a_new_schedule_owes_nothing(bench: Bench) -> None:
    bench.run(20)
    assert bench.dues() == []


def test_a_run_that_goes_on_is_found_again(bench: Bench) -> None:
    bench.runner.minutes = 20
    runs = bench.run(31)
    assert [run.end for run in runs] == [None], "it was told to end, and left the run alone"
    bench.clock.moment = NOON + timedelta(minutes=45)
    runs = bench.run(8)
    assert len(bench.runner.begun) == 1
    assert runs[0].end is not None
    assert (runs[0].end.status, runs[0].end.changed) == ("SUCCEEDED", SUMMARY)


def test_a_run_that_the_cluster_lost_is_made_up_once(bench: Bench) -> None:
    bench.runner.minutes = 20
    bench.run(31)
    bench.runner.begun.clear()  # another cluster
    runs = bench.run(25)
    assert [run.end and run.end.status for run in runs] == [LOST, "SUCCEEDED"]
    assert bench.dues() == [30, 30]


def test_a_run_that_is_lost_each_time_waits_for_the_next(bench: Bench) -> None:
    """Taken, and unknown at the next look: as by a cluster that is made anew again and again."""
    real = bench.runner.job

    def forget(run: str) -> Job:
        bench.runner.begun.pop(run, None)
        return real(run)

    looks: list[str] = []

    def look(run: str) -> Job:
        looks.append(run)
        return real(run) if looks.count(run) == 1 else forget(run)

    bench.runner.job = look  # type: ignore[method-assign]
    runs = bench.run(80)
    assert [run.end and run.end.status for run in runs] == [LOST] * 4
    assert bench.dues() == [30, 30, 60, 60]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("reset"), BrokenRunError("status code 500"), UnreachableError("no cluster")],
)
def test_a_run_is_owed_while_the_cluster_is_away(bench: Bench, error: Exception) -> None:
    """At a cold start, too. It is submitted when the cluster is there again, once for all times
    that passed."""

    def away(run: str) -> None:
        if bench.clock.now() < NOON + timedelta(minutes=100):
            raise error

    bench.runner.fail = away
    runs = bench.run(122)
    assert bench.dues() == [30, 90, 120]
    assert [run.end and run.end.status for run in runs] == ["SUCCEEDED", "SUCCEEDED", None]
    assert list(bench.runner.begun) == [run.start.run for run in runs]
    assert sum(str(error) in line for line in bench.said) == 1, "said once"


def test_a_lost_acknowledgement_starts_no_second_job(bench: Bench) -> None:
    """The cluster took it, and tells of it only when the way to it is whole again."""
    real_job = bench.runner.job
    answers = [ConnectionError("reset"), ConnectionError("reset")]

    def lose_the_answer(run: str) -> None:
        if answers:
            bench.runner.begun.setdefault(run, bench.clock.now())
            raise answers.pop()

    def late(run: str) -> Job:
        if answers:
            raise UnknownJobError(f"job {run}: unknown")
        return real_job(run)

    bench.runner.fail = lose_the_answer
    bench.runner.job = late  # type: ignore[method-assign]
    (run,) = bench.run(50)
    assert run.end is not None
    assert run.end.status == "SUCCEEDED"
    assert list(bench.runner.begun) == [run.start.run]
    assert answers == []


@pytest.mark.parametrize("error", [BrokenRunError("its node is gone"), TimeoutError("60 s")])
def test_a_log_that_is_gone_does_not_stop_the_schedule(bench: Bench, error: Exception) -> None:
    def gone(run: str) -> str:
        raise error

    bench.runner.log = gone  # type: ignore[method-assign]
    runs = bench.run(70)
    assert bench.dues() == [30, 60]
    for run in runs:
        assert run.end is not None
        assert (run.end.status, run.end.exit, run.end.changed) == ("SUCCEEDED", 0, None)
        assert run.end.message == f"its log cannot be read: {error}"


def test_a_log_that_cannot_be_had_for_a_moment_is_asked_for_again(bench: Bench) -> None:
    real_log, troubles = bench.runner.log, [BrokenRunError("500"), TimeoutError("60 s")]

    def slow(run: str) -> str:
        if troubles:
            raise troubles.pop()
        return real_log(run)

    bench.runner.log = slow  # type: ignore[method-assign]
    (run,) = bench.run(50)
    assert run.end is not None
    assert (run.end.status, run.end.changed, run.end.message) == ("SUCCEEDED", SUMMARY, "")


def test_told_to_end_during_a_look_it_starts_no_run_that_is_due(bench: Bench) -> None:
    """A run longer than the timetable's interval ends in the very look in which SIGTERM comes."""
    bench.runner.minutes, real_job = 45.0, bench.runner.job

    def job(run: str) -> Job:
        if (looked := real_job(run)).over:
            bench.clock.end = bench.clock.moment
        return looked

    bench.runner.job = job  # type: ignore[method-assign]
    (run,) = bench.run(500)
    assert bench.dues() == [30]
    assert run.end is not None
    assert run.end.status == "SUCCEEDED"


def test_a_clock_that_was_ahead_for_a_time_stops_nothing(bench: Bench) -> None:
    bench.clock.moment = NOON + timedelta(days=400, minutes=1)
    bench.run(40)
    bench.clock.moment = NOON + timedelta(minutes=1)
    bench.run(70)
    assert bench.dues()[1:] == [30, 60]
    (line,) = [line for line in bench.said if "the clock was set back" in line]
    assert "due 2027-12-29 12:30 UTC" in line


def test_what_cannot_be_submitted_is_told_and_the_next_time_tries_again(bench: Bench) -> None:
    def refuse(run: str) -> None:
        if bench.clock.now() < NOON + timedelta(minutes=45):
            raise UserError("the Ray cluster refuses this user's token")

    bench.runner.fail = refuse
    runs = bench.run(70)
    assert [run.end and run.end.status for run in runs] == [NOT_SUBMITTED, "SUCCEEDED"]
    assert bench.dues() == [30, 60]
    assert runs[0].end is not None
    assert "refuses" in runs[0].end.message
    assert any("refuses" in line for line in bench.said)


def test_a_cluster_that_is_away_for_a_while_is_waited_for(bench: Bench) -> None:
    real = bench.runner.job

    def away(run: str) -> Job:
        if bench.clock.now() < NOON + timedelta(minutes=50):
            raise ConnectionError("refused")
        return real(run)

    bench.runner.job = away  # type: ignore[method-assign]
    (run,) = bench.run(55)
    assert run.end is not None
    assert run.end.status == "SUCCEEDED"
    assert sum("refused" in line for line in bench.said) == 1, "said once"


def test_naps_are_short_enough_to_notice_a_clock_that_is_set(bench: Bench) -> None:
    bench.run(20)
    assert max(bench.clock.waited) <= 60


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", None),
        ("no document\n", None),
        ('{\n "a": 1\n}\n', {"a": 1}),
        ('{\n "a": 1\n}\nx\n{\n "b": {\n  "c": 2\n }\n}\nlast words\n', {"b": {"c": 2}}),
        ("{\nnot one\n}\n", None),
        ('{\n "a": 1\n}\n{\nwarning\n}\n', {"a": 1}),
        ('{"a": 1}\n', None),  # a record of some other program: ours spread over lines
    ],
)
def test_the_summary_is_the_last_document_of_the_log(log: str, expected: object) -> None:
    assert last_document(log) == expected


def test_the_history_is_shown(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    runs = bench.run(45)
    show_history(runs, as_json=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2026-11-24 12:30:00  2026-11-24 12:35:00  reindex-20261124T1230-")
    assert line.endswith("SUCCEEDED, exit 0: new 1, unchanged 2")
    show_history(runs, as_json=True)
    (document,) = json.loads(capsys.readouterr().out)
    assert document["end"]["changed"] == SUMMARY


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_at_once(number: signal.Signals) -> None:
    code = (
        "from jobs.schedule import WallClock\nclock = WallClock()\n"
        "print('waits', flush=True)\nprint(clock.wait(600), clock.wait(600))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=cli_env(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        assert process.communicate(timeout=240)[0] == "True True\n"
    assert process.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["reindex"]])
def test_a_schedule_without_work_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="nothing to run"):
        RayRunner(None, arguments, Place())
