"""From a few shards to all of them: which are looked at, and how sure the totals are.

Shards are clusters, drawn at random without putting back; a total is the ratio of what was counted
to the bytes it was counted in, times the bytes of all (the ratio estimator: W. G. Cochran, Sampling
Techniques, 3rd edition 1977, sections 6.2-6.4). With m of M shards, y_i counted in the x_i bytes of
shard i, X bytes in all:

    R = Σ y_i / Σ x_i        total = R · X
    s² = Σ (y_i - R x_i)² / (m - 1)
    standard error = M · sqrt((1 - m / M) · s² / m)

and the 95 % interval is total ± t · standard error, t of Student's distribution with m - 1 degrees
of freedom. Where all shards were looked at the interval is a point. Shards that are like those of
INPUT but none of them (`apart`: an earlier run's) leave the factor 1 - m / M out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
Z = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A total and its 95 % interval; `low` and `high` are None where one shard tells nothing."""

    value: float
    low: float | None
    high: float | None

    def scaled(self, factor: float) -> Estimate:
        return Estimate(
            self.value * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
        )


def choose(num_shards: int, wanted: int, seed: int) -> list[int]:
    """Which shards are looked at, in order; all where no more than that are there."""
    if wanted >= num_shards:
        return list(range(num_shards))
    return sorted(random.Random(seed).sample(range(num_shards), wanted))  # noqa: S311 no secret


def ratio_total(
    counted: Sequence[float],
    sizes: Sequence[int],
    num_shards: int,
    total_bytes: int,
    apart: bool = False,
) -> Estimate:
    """The total over all shards of what was `counted` in those of `sizes` bytes."""
    assert len(counted) == len(sizes)
    assert apart or len(sizes) <= num_shards
    looked_at, seen = len(sizes), sum(sizes)
    if not seen:
        return Estimate(0.0, None, None)
    if looked_at == num_shards and not apart:
        whole = float(sum(counted))
        return Estimate(whole, whole, whole)
    ratio = sum(counted) / seen
    total = ratio * total_bytes
    if looked_at < 2:
        return Estimate(total, None, None)
    squares = sum((y - ratio * x) ** 2 for y, x in zip(counted, sizes, strict=True))
    left = 1.0 if apart else 1 - looked_at / num_shards
    variance = left * squares / (looked_at - 1) / looked_at
    margin = student_t(looked_at - 1) * num_shards * math.sqrt(variance)
    return Estimate(total, max(0.0, total - margin), total + margin)


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's distribution.

    Exact for 1 and 2 degrees of freedom; else the expansion about the normal quantile
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5), within 0.2 % from 3 on.
    """
    assert degrees >= 1
    if degrees == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    if degrees == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    z, n = Z, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
