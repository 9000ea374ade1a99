"""When shards were committed: the run's pace over time, its pauses left out of its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

MAX_BINS = 96
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
PAUSE_SECONDS = 600
PAUSE_STEPS = 20  # a pause is longer than so many usual steps from a commit to the next


@dataclass(frozen=True)
class Timeline:
    """`rates` are tiles/s of each bin, `totals` all tiles at its end. `active_seconds` is None
    where commits are too few to tell."""

    start: int  # of the first bin, in seconds since 1970
    step: int  # seconds
    rates: tuple[float, ...]
    totals: tuple[int, ...]
    active_seconds: float | None
    pauses: int

    def label(self, at: int) -> str:
        """The moment at which a bin begins."""
        moment = datetime.fromtimestamp(self.start + at * self.step, UTC)
        return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def timeline(moments: Sequence[int], tiles: Sequence[int]) -> Timeline | None:
    """`moments` are those of the commits, in seconds, in any order; None where there is none."""
    if not moments:
        return None
    order = sorted(range(len(moments)), key=moments.__getitem__)
    first, last = moments[order[0]], moments[order[-1]]
    span = last - first
    step = next((s for s in STEPS if span / s < MAX_BINS), -(-span // MAX_BINS))
    start = first // step * step
    sums = [0] * ((last - start) // step + 1)
    for at in order:
        sums[(moments[at] - start) // step] += tiles[at]
    totals = []
    total = 0
    for part in sums:
        total += part
        totals.append(total)
    gaps = [moments[b] - moments[a] for a, b in pairwise(order)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0
    limit = max(PAUSE_SECONDS, PAUSE_STEPS * usual)
    pauses = [gap for gap in gaps if gap > limit]
    active = span - sum(pauses)
    return Timeline(
        start,
        step,
        tuple(part / step for part in sums),
        tuple(totals),
        float(active) if active else None,
        len(pauses),
    )
