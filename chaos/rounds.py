"""A round: one OUTPUT, computed under strikes, run again until it is whole, and looked through."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos.faults import REPLICA
from chaos.job import NUM_SHARDS, Job, Run
from chaos.nodes import Nodes
from chaos.plan import Strike
from chaos.processes import at_work, title
from tests.running import comparable

LONGEST_SILENCE_SECONDS = 600.0  # without a commit: the job hangs
MOST_RUNS = 40
REPLACED_AFTER_SECONDS = 3.0  # a lost node, as by an autoscaler
LINGER_SECONDS = 90.0  # what belongs to a job that has ended
TITLES = (REPLICA, "ray::Deaths", "model.ranks", "ray::MapBatches", "ray::finalize_stage")


@dataclass
class Kill:
    """What came of one strike. `seconds` since its run began; None where nothing followed."""

    strike: Strike
    victim: str
    phase: str
    seconds: float
    at: float
    exit_status: int | None = None
    said: str = ""
    ended_after: float = 0.0
    recovered_after: float | None = None
    runs_after: int = 0
    problems: list[str] = field(default_factory=list)


class Commits:
    """Remembers every commit as it was when it was first seen, and when that was."""

    def __init__(self, output: Path) -> None:
        self._folder = output / "commits"
        self._seen: dict[str, tuple[bytes, int]] = {}
        self.times: list[float] = []

    def look(self) -> int:
        """Gives how many shards are committed."""
        for file in self._folder.glob("*.json"):
            if file.name not in self._seen:
                self._seen[file.name] = self._state(file.name)
                self.times.append(time.monotonic())
        return len(self._seen)

    def changed(self) -> list[str]:
        """Commits that are not what they were: their shards were computed again."""
        return sorted(name for name, seen in self._seen.items() if seen != self._state(name))

    def _state(self, name: str) -> tuple[bytes, int]:
        """Nothing for a commit that is gone."""
        file = self._folder / name
        return (file.read_bytes(), file.stat().st_mtime_ns) if file.exists() else (b"", 0)


class Round:
    """`nodes` is replaced where the cluster itself was struck."""

    def __init__(
        self,
        job: Job,
        output: Path,
        nodes: Nodes,
        reference: dict[str, bytes] | None,
        say: Callable[[str], None],
    ) -> None:
        self.job = job
        self.output = output
        self.nodes = nodes
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self._reference = reference
        self._say = say
        self._commits = Commits(output)
        self._replace_at: float | None = None

    def play(self, strikes: deque[Strike]) -> None:
        """Takes strikes as long as they fit this job, until OUTPUT is whole."""
        for number in range(1, MOST_RUNS + 1):
            run = Run.start(
                self.job,
                self.output,
                self.nodes.address,
                self.output.with_name(f"{self.output.name}-run-{number}.log"),
            )
            first = len(self.kills)
            self._follow(run, strikes)
            struck = self.kills[first:]
            if strikes and not struck and self._reference is not None:
                strikes[0] = replace(strikes[0], working=False, delay_seconds=0.0)  # it came late
            self._judge(run, struck)
            for kill in self.kills[:first]:
                kill.runs_after += kill.recovered_after is None or run.process.returncode != 0
            if any(kill.strike.fault.ends_cluster for kill in struck):
                self.nodes.shutdown(graceful=False)
                self.nodes = Nodes()
            self.nodes.replace_workers()
            if run.process.returncode == 0:
                break
        else:
            self.problems.append(f"not whole after {MOST_RUNS} runs")
        self._look_through()

    def _follow(self, run: Run, strikes: deque[Strike]) -> None:
        first = base = self._commits.look()
        since, over = run.began, False
        while run.process.poll() is None:
            done = self._commits.look()
            now = time.monotonic()
            last = max([since, *self._commits.times[-1:]])
            if now - last > LONGEST_SILENCE_SECONDS:
                self.problems.append(
                    f"no progress for {LONGEST_SILENCE_SECONDS:g} s: driver killed"
                )
                run.process.kill()
                run.process.wait()
                return
            if self._replace_at is not None and now >= self._replace_at and not over:
                self.nodes.replace_workers()
                self._replace_at = None
            strike = None if over else self._next(strikes, done > first)
            if strike is None or not self._due(strike, since, base, done):
                time.sleep(0.05)
            elif self._strike(strike, run, done):
                strikes.remove(strike)
                since, base = time.monotonic(), done
                over = strike.fault.ends_run
            else:
                time.sleep(0.004)

    def _next(self, strikes: deque[Strike], late: bool) -> Strike | None:
        """The next one that fits; work that is over by now is struck early in another run."""
        fitting = (strike for strike in strikes if strike.fault.ranks == self.job.ranks)
        return next((strike for strike in fitting if not (late and strike.fault.early)), None)

    def _due(self, strike: Strike, since: float, base: int, done: int) -> bool:
        if self._replace_at is not None:
            return False
        slow = bool(self.kills) and self.kills[-1].strike.fault.slow
        if strike.working or slow:
            delay = strike.delay_seconds
            return done > base and time.monotonic() >= self._commits.times[base] + delay
        return time.monotonic() >= since + strike.delay_seconds

    def _strike(self, strike: Strike, run: Run, done: int) -> bool:
        phase, seconds, at = self._phase(done), run.seconds, time.monotonic()
        victim = strike.fault.strike(run, self.nodes, strike.pick)
        if victim is None:
            return False
        if len(self.nodes.workers()) < 2:
            self._replace_at = at + REPLACED_AFTER_SECONDS
        self.kills.append(Kill(strike, victim, phase, seconds, at))
        self._say(f"{strike.number:4d}  {strike.fault.name}: {victim}; {phase}, {seconds:.1f} s")
        return True

    def _phase(self, done: int) -> str:
        if done:
            return f"{done} of {NUM_SHARDS} committed"
        replicas = at_work(REPLICA)
        if not replicas:
            return "start"
        return "loading" if title(replicas[0]).endswith("__init__") else "before the first commit"

    def _judge(self, run: Run, struck: list[Kill]) -> None:
        """Of the run alone: how it ended, and whether that is what its faults allow."""
        ended, status, said = time.monotonic(), run.process.returncode, run.said()
        may_end = any(kill.strike.fault.ends_run for kill in struck)
        problem = ""
        if run.shows_traceback():
            problem = "the driver showed a traceback"
        elif status not in ((0, 1, -9) if may_end else (0,)):
            problem = f"the run ended with {status}: {said[-1] if said else 'it said nothing'}"
        elif status == 1 and not any(line.startswith("tessera: ") for line in said):
            problem = "the run ended with 1 and did not say why"
        for kill in struck:
            kill.exit_status = status
            told = [line for line in said if line.startswith("tessera: ")] or said
            kill.said = told[-1][:300] if told and status == 1 else ""
            kill.ended_after = ended - kill.at
            if problem:
                kill.problems.append(problem)
        if problem and not struck:
            self.problems.append(problem)
        self._say(f"      ended with {status} after {run.seconds:.1f} s {problem}")

    def _look_through(self) -> None:
        """Of OUTPUT and the cluster, once all is computed."""
        self._commits.look()
        for kill in self.kills:
            later = [at for at in self._commits.times if at > kill.at]
            kill.recovered_after = later[0] - kill.at if later else None
        if changed := self._commits.changed():
            self.problems.append(f"computed again: {', '.join(changed)}")
        found = comparable(self.output)
        if self._reference is not None and found != self._reference:
            self.problems.append(f"OUTPUT differs: {differences(found, self._reference)}")
        until = time.monotonic() + LINGER_SECONDS
        while (left := self._lingering()) and time.monotonic() < until:
            time.sleep(0.2)
        if left:
            self.problems.append(f"left behind: {left}")
        for problem in self.problems:
            self._say(f"      PROBLEM: {problem}")
            for kill in self.kills:  # nobody knows which of them it was
                kill.problems.append(f"in its round: {problem}")

    def _lingering(self) -> str:
        processes = [f"{pid} {title(pid)[:60]}" for words in TITLES for pid in at_work(words)]
        left = self.nodes.leftovers()
        return "; ".join([*processes, *([str(left)] if left else [])])


def differences(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    """Names of files that are missing, too many, or other than they should be."""
    names = sorted(found.keys() | wanted.keys())
    kinds = {
        name: "missing" if name not in found else "too many" if name not in wanted else "other"
        for name in names
        if found.get(name) != wanted.get(name)
    }
    return ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:8])
