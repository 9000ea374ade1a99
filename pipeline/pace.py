"""Rates over the last minutes: of the run, and of each replica."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pipeline.records import Compute

WINDOW_SECONDS = 120.0  # a few chunks of the slowest GPUs
SILENCE_SECONDS = 10.0  # at least: short chunks come in bursts, as they are written


class Pace:
    """Tiles/s over the window."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, moment: float, tiles: int) -> None:
        self._steps.append((moment, tiles))

    def rate(self, now: float) -> float:
        """What came after the window's first row, over the time since; 0 where nothing did."""
        while self._steps and self._steps[0][0] < now - WINDOW_SECONDS:
            self._steps.popleft()
        if len(self._steps) < 2 or now <= self._steps[0][0]:
            return 0.0
        return sum(tiles for _, tiles in list(self._steps)[1:]) / (now - self._steps[0][0])


@dataclass(frozen=True)
class Step:
    """A chunk of a replica: when the driver heard of it, and how its time was spent."""

    moment: float
    tiles: int
    busy_seconds: float
    starved_seconds: float


class ReplicaPace:
    """How one replica spent its time over the window.

    `compute` is how it computed last: `batch_tiles` may change while it lives. The last chunk is
    kept however old it is, for a replica that waits tells nothing of it.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._steps: deque[Step] = deque()

    def add(self, step: Step, compute: Compute) -> None:
        self.compute = compute
        self._steps.append(step)

    def forget(self, now: float) -> None:
        """Drops what is older than the window."""
        while len(self._steps) > 1 and self._steps[0].moment < now - WINDOW_SECONDS:
            self._steps.popleft()

    def silent_seconds(self, now: float) -> float:
        """Since the last chunk; 0 as long as the next may still be computed."""
        silence = now - self._steps[-1].moment
        longest = max(step.busy_seconds for step in self._steps)
        return silence if silence > max(2 * longest, SILENCE_SECONDS) else 0.0

    def busy_share(self, now: float) -> float:
        busy, starved = self._seconds(now)
        return busy / (busy + starved) if busy + starved else 0.0

    def rate(self, now: float) -> float | None:
        """Tiles/s, waiting included."""
        busy, starved = self._seconds(now)
        return self._tiles() / (busy + starved) if busy + starved else None

    def busy_rate(self) -> float | None:
        """Tiles/s while it computed."""
        busy = self._busy_seconds()
        return self._tiles() / busy if busy else None

    def batch_fill(self) -> float | None:
        """Tiles over the places of all forward passes: the last of a chunk is seldom full."""
        batch = self.compute.batch_tiles
        places = sum(-(-step.tiles // batch) * batch for step in self._steps)
        return self._tiles() / places if places else None

    def _tiles(self) -> int:
        return sum(step.tiles for step in self._steps)

    def _busy_seconds(self) -> float:
        return sum(step.busy_seconds for step in self._steps)

    def _seconds(self, now: float) -> tuple[float, float]:
        """Busy and starved; a silence is starved, as the next chunk will tell."""
        starved = sum(step.starved_seconds for step in self._steps)
        return self._busy_seconds(), starved + self.silent_seconds(now)
