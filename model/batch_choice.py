"""How many tiles one forward pass takes: by trying, up to the knee or the end of the memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchChoice:
    """Tiles in one forward pass, and the speed of each number that was tried."""

    batch_tiles: int
    tiles_per_second: dict[int, float]


def choose_batch(
    measure: Callable[[int], float],
    *,
    largest: int,
    budget_seconds: float = 30.0,
    gain: float = 1.03,
    clock: Callable[[], float] = time.perf_counter,
) -> BatchChoice:
    """Tries 1, 2, 4, … up to `largest` tiles and takes the fewest within `gain` of the best speed.

    `measure(n)` returns the seconds of one forward pass of n tiles, and raises
    torch.OutOfMemoryError where they do not fit. The trials end at the knee (twice the tiles
    bring less than `gain` in tiles a second), where memory ends, or where the next trial, if it
    took twice as long as the last, would end after `budget_seconds`. Raises what `measure`
    raises; OutOfMemoryError only where a single tile does not fit.
    """
    assert largest >= 1
    assert gain > 1
    begin = clock()
    speeds: dict[int, float] = {}  # tiles a second
    n, end = 1, f"the largest asked for is {largest}"
    while n <= largest:
        start = clock()
        try:
            speeds[n] = n / measure(n)
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            end = f"{n} do not fit"
            break
        if n > 1 and speeds[n] < gain * speeds[n // 2]:
            end = f"{n} are hardly faster"
            break
        took = clock() - start
        if clock() - begin + 2 * took > budget_seconds:
            end = f"{budget_seconds:g} s of trials are over"
            break
        n *= 2
    best = max(speeds.values())
    batch_tiles = min(n for n, speed in speeds.items() if gain * speed > best)
    trials = ", ".join(f"{n}: {speed:.1f}" for n, speed in speeds.items())
    logger.info("batch_tiles: %d, %s; tiles/s by batch: %s", batch_tiles, end, trials)
    return BatchChoice(batch_tiles, speeds)
