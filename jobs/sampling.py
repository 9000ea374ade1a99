"""From a few shards to all of them: which are looked at, and how sure the totals are.

Shards are clusters, drawn at random without putting back. Their bytes are known for all of INPUT,
so a total is estimated along a straight line through what was counted (y) against bytes (x). With m
of M shards looked at, means x̄ and ȳ of those, and X̄ the mean of all:

    b = Σ (x - x̄)(y - ȳ) / Sxx,   Sxx = Σ (x - x̄)²
    total = M · (ȳ + b (X̄ - x̄))
    s² = Σ (y - ȳ - b (x - x̄))² / (m - 2)
    standard error = M · sqrt(s² · ((1 - m / M) / m + (X̄ - x̄)² / Sxx))

(the regression estimator: W. G. Cochran, Sampling Techniques, 3rd edition 1977, sections 7.2-7.7).
Shards of one number of pictures and shards in which pictures go with bytes are both served by it.
Fewer than 10 shards do not carry a slope, nor do shards that are like INPUT's but none of them
(`apart`: an earlier run's). For them a total is in proportion to bytes:

    R = Σ y / Σ x,   total = R · M X̄
    standard error = M · sqrt((1 - m / M) / m · Σ (y - R x)² / (m - 1))

(the ratio estimator: there, sections 6.2-6.4), without the factor 1 - m / M for shards apart.

The 95 % interval is total ± t · standard error, t of Student's distribution with m - 2 or m - 1
degrees of freedom. Where all shards were looked at it is a point. Where nothing was counted in n
pictures, up to 3 / n of all may still be there (the rule of three: J. A. Hanley, A. Lippman-Hand,
JAMA 249, 1983).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
Z = 1.959964  # of the normal distribution, two-sided 95 %
LEAST_FOR_SLOPE = 10
RULE_OF_THREE = 3.0


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


def estimate_total(
    counted: Sequence[float],
    sizes: Sequence[int],
    num_shards: int,
    total_bytes: int,
    apart: bool = False,
) -> Estimate:
    """The total over all shards of what was `counted` in those of `sizes` bytes."""
    assert len(counted) == len(sizes)
    assert apart or len(sizes) <= num_shards
    if not sum(sizes):
        return Estimate(0.0, None, None)
    if len(sizes) == num_shards and not apart:
        whole = float(sum(counted))
        return Estimate(whole, whole, whole)
    if len(sizes) < LEAST_FOR_SLOPE or apart:
        return _by_ratio(counted, sizes, num_shards, total_bytes, apart)
    return _by_line(counted, sizes, num_shards, total_bytes)


def _by_line(
    counted: Sequence[float], sizes: Sequence[int], num_shards: int, total_bytes: int
) -> Estimate:
    m = len(sizes)
    mean_x, mean_y, ahead = sum(sizes) / m, sum(counted) / m, total_bytes / num_shards
    spread = sum((x - mean_x) ** 2 for x in sizes)
    slope = 0.0
    if spread:
        pairs = zip(sizes, counted, strict=True)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    total = num_shards * (mean_y + slope * (ahead - mean_x))
    squares = sum(
        (y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(sizes, counted, strict=True)
    )
    leverage = (ahead - mean_x) ** 2 / spread if spread else 0.0
    variance = squares / (m - 2) * ((1 - m / num_shards) / m + leverage)
    return _interval(total, num_shards * math.sqrt(variance), m - 2)


def _by_ratio(
    counted: Sequence[float],
    sizes: Sequence[int],
    num_shards: int,
    total_bytes: int,
    apart: bool,
) -> Estimate:
    m, ratio = len(sizes), sum(counted) / sum(sizes)
    total = ratio * total_bytes
    if m < 2:
        return Estimate(total, None, None)
    squares = sum((y - ratio * x) ** 2 for y, x in zip(counted, sizes, strict=True))
    left = 1.0 if apart else 1 - m / num_shards
    variance = left / m * squares / (m - 1)
    return _interval(total, num_shards * math.sqrt(variance), m - 1)


def _interval(total: float, error: float, degrees: int) -> Estimate:
    margin = student_t(degrees) * error
    return Estimate(max(0.0, total), max(0.0, total - margin), max(0.0, total + margin))


def none_seen(looked_at: int, of: float) -> Estimate:
    """The total of what was not met once among `looked_at` of `of` things."""
    return Estimate(0.0, 0.0, of * min(1.0, RULE_OF_THREE / max(looked_at, 1)))


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
