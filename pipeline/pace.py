"""Rates over the last minutes: of the run, and of each replica."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pipeline.records import Compute

WINDOW_SECONDS = 120.0  # a few chunks of the slowest GPUs


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

    `compute` is how it computed last: `batch_tiles` may change while it lives.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._steps: deque[Step] = deque()

    def add(self, step: Step, compute: Compute) -> None:
        self.compute = compute
        self._steps.append(step)
        while self._steps[0].moment < step.moment - WINDOW_SECONDS:
            self._steps.popleft()

    def is_recent(self, now: float) -> bool:
        return self._steps[-1].moment >= now - WINDOW_SECONDS

    def busy_share(self) -> float:
        busy, starved = self._seconds()
        return busy / (busy + starved) if busy + starved else 0.0

    def rate(self) -> float | None:
        """Tiles/s, waiting included."""
        busy, starved = self._seconds()
        return self._tiles() / (busy + starved) if busy + starved else None

    def busy_rate(self) -> float | None:
        """Tiles/s while it computed."""
        busy, _ = self._seconds()
        return self._tiles() / busy if busy else None

    def batch_fill(self) -> float | None:
        """Tiles over the places of all forward passes: the last of a chunk is seldom full."""
        batch = self.compute.batch_tiles
        places = sum(-(-step.tiles // batch) * batch for step in self._steps)
        return self._tiles() / places if places else None

    def _tiles(self) -> int:
        return sum(step.tiles for step in self._steps)

    def _seconds(self) -> tuple[float, float]:
        return (
            sum(step.busy_seconds for step in self._steps),
            sum(step.starved_seconds for step in self._steps),
        )
