"""How fast a run on this machine's cores is: replicas and tiling measured alone and together.

On a local cluster both share the cores, tiling at the lowest priority. What they make of them is
measured, not reckoned: replicas alone, then beside the tiling tasks that the job would have, in
turns. The best of the turns counts, because another program can only make one slower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from jobs.stage_clock import Done, EncodeJob, Ready, TileJob
from jobs.trial import group_of
from model.errors import UserError
from pipeline.records import to_ipc
from pipeline.samples import GROUP_SAMPLES

CLOCK = "jobs.stage_clock"
TURNS = 5
TURN_SECONDS = 2.0  # and twice that for both together
# As `jobs.cluster` sets them for a local cluster, and Ray for tasks and actors below two CPUs.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class CpuRates:
    """Tiles a second of all replicas or all tiling tasks together; `beside`: while both work.

    `load_seconds`: from the start of a replica's process until it is ready.
    """

    encode_alone: float
    encode_beside: float
    tile_alone: float
    tile_beside: float
    load_seconds: float
    detail: str


def shared_rate(rates: CpuRates) -> float:
    """Tiles a second of a run in which both share the cores.

    Where tiling is the faster beside the replicas, it fills the buffer and then works a share f of
    the time only, in which it makes what is embedded all the time:

        f · tile_beside = f · encode_beside + (1 - f) · encode_alone

    Where it is the slower, the replicas starve a share g of the time and leave it the cores:

        (1 - g) · encode_beside = (1 - g) · tile_beside + g · tile_alone
    """
    ahead = rates.tile_beside - rates.encode_beside
    if ahead >= 0:
        share = rates.encode_alone / (ahead + rates.encode_alone)
        return share * rates.tile_beside
    starved = -ahead / (-ahead + rates.tile_alone)
    return (1 - starved) * rates.encode_beside


def measure(
    samples: Sequence[Mapping[str, Any]],
    tile: TileJob,
    encode: EncodeJob,
    replicas: int,
    tilers: int,
    say: Callable[[str], None],
) -> CpuRates:
    """Starts the processes of a local run, but for Ray, and times them.

    Raises:
        UserError: one of them ended; the line is what it said last.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-plan-") as folder:
        files = _write_groups(samples, tile.carry, Path(folder))
        jobs = [
            *[("encode", asdict(encode))] * replicas,
            *[("tile", {**asdict(tile), "samples": files})] * tilers,
        ]
        with _started(jobs) as clocks:
            ready = [clock.ready() for clock in clocks]
            encoders, tiling = clocks[:replicas], clocks[replicas:]
            turns = []
            for turn in range(TURNS):
                say(f"measuring the replica and tiling, turn {turn + 1} of {TURNS}")
                alone = _rate(_together(encoders, TURN_SECONDS))
                tiled = _rate(_together(tiling, TURN_SECONDS))
                both = _together(clocks, 2 * TURN_SECONDS)
                turns.append((alone, _rate(both[:replicas]), tiled, _rate(both[replicas:])))
    return best_of(turns, max(entry.seconds for entry in ready[:replicas]), ready[0].detail)


def best_of(
    turns: Sequence[tuple[float, float, float, float]], load_seconds: float, detail: str
) -> CpuRates:
    """Of turns (replicas alone, beside tiling, tiling alone, beside replicas).

    What was measured together stays together: of those pairs the one that gives most.
    """
    alone, tiled = max(turn[0] for turn in turns), max(turn[2] for turn in turns)
    rates = CpuRates(alone, 0.0, tiled, 0.0, load_seconds, detail)
    pairs = [replace(rates, encode_beside=turn[1], tile_beside=turn[3]) for turn in turns]
    return max(pairs, key=shared_rate)


def _write_groups(
    samples: Sequence[Mapping[str, Any]], carry: tuple[str, ...], folder: Path
) -> tuple[str, ...]:
    files = []
    for number, at in enumerate(range(0, len(samples), GROUP_SAMPLES)):
        file = folder / f"{number}.arrow"
        group = group_of(samples[at : at + GROUP_SAMPLES], carry, number)
        file.write_bytes(to_ipc(group.samples))
        files.append(str(file))
    return tuple(files)


class Clock:
    """One process of `jobs.stage_clock`."""

    def __init__(self, kind: str, job: Mapping[str, Any]) -> None:
        self._kind = kind
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the process
        self._process = subprocess.Popen(  # noqa: S603 this program's own module
            [sys.executable, "-m", CLOCK, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self._order(json.dumps(job))

    def ready(self) -> Ready:
        return Ready(**self._answer())

    def work(self, seconds: float) -> Done:
        self._order(str(seconds))
        return Done(**self._answer())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why is told when its answer is asked for

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(0)
        last = [line for line in self._log.read().splitlines() if line.strip()][-1:]
        reason = last[0] if last else f"exit status {self._process.returncode}"
        raise UserError(f"plan: cannot measure {self._kind} here: {reason}")


@contextmanager
def _started(jobs: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[list[Clock]]:
    clocks: list[Clock] = []
    try:
        for kind, job in jobs:
            clocks.append(Clock(kind, job))
        yield clocks
    finally:
        for clock in clocks:
            clock.end()


def _together(clocks: Sequence[Clock], seconds: float) -> list[Done]:
    """All work at the same time."""
    found: dict[int, Done | Exception] = {}

    def work(index: int) -> None:
        try:
            found[index] = clocks[index].work(seconds)
        except Exception as error:  # noqa: BLE001 raised again below
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(clocks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = []
    for index in range(len(clocks)):
        outcome = found[index]
        if isinstance(outcome, Exception):
            raise outcome
        done.append(outcome)
    return done


def _rate(done: Sequence[Done]) -> float:
    return sum(entry.tiles / entry.seconds for entry in done)
