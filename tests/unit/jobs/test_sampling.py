"""Estimates: exact when all is seen, right in their formula, and as sure as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from jobs.sampling import choose, estimate_total, none_seen, student_t

POPULATIONS = 400
SHARDS = 200


def proportional(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of all kinds, tiles that go with them."""
    sizes = rng.lognormal(18, 0.5, SHARDS).astype(int)
    return sizes, sizes * rng.normal(6e-5, 6e-6, SHARDS)


def constant(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As many pictures in each, of sizes that tell little of their tiles."""
    return rng.normal(1e8, 8e6, SHARDS).astype(int), rng.normal(7500, 450, SHARDS)


@pytest.mark.parametrize("population", [proportional, constant])
@pytest.mark.parametrize(("looked_at", "least"), [(6, 0.90), (20, 0.92), (60, 0.92)])
def test_intervals_hold_the_truth_as_often_as_they_say(
    population: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    looked_at: int,
    least: float,
) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(POPULATIONS):
        sizes, tiles = population(rng)
        at = choose(SHARDS, looked_at, seed)
        found = estimate_total(
            [float(tiles[i]) for i in at], [int(sizes[i]) for i in at], SHARDS, int(sizes.sum())
        )
        assert found.low is not None
        assert found.high is not None
        held += found.low <= tiles.sum() <= found.high
    assert least <= held / POPULATIONS <= 0.98


def test_all_shards_leave_nothing_to_estimate() -> None:
    found = estimate_total([3, 4, 5], [10, 10, 30], 3, 50)
    assert (found.value, found.low, found.high) == (12.0, 12.0, 12.0)


def test_few_shards_in_proportion_to_their_bytes() -> None:
    found = estimate_total([10, 50], [100, 200], 5, 1000)
    assert found.value == pytest.approx(200)
    # R = 0.2, residuals 10 - 20 and 50 - 40, s² = 200
    margin = 12.7062 * 5 * math.sqrt((1 - 2 / 5) / 2 * 200)
    assert found.high == pytest.approx(200 + margin, rel=1e-4)
    assert found.low == 0.0


def test_shards_of_another_run_are_no_part_of_the_whole() -> None:
    within = estimate_total([10, 30, 20], [100, 200, 150], 4, 600)
    apart = estimate_total([10, 30, 20], [100, 200, 150], 4, 600, apart=True)
    assert apart.value == within.value
    assert apart.high is not None
    assert within.high is not None
    assert apart.high - apart.value == pytest.approx(2 * (within.high - within.value))
    assert estimate_total([10, 30], [100, 200], 1, 150, apart=True).value == pytest.approx(20)


def test_a_straight_line_is_followed_to_the_mean_of_all() -> None:
    sizes = list(range(100, 112))
    counted = [5.0 + 2 * size for size in sizes]
    found = estimate_total(counted, sizes, 24, 24 * 200)
    assert found.value == pytest.approx(24 * 405)
    assert found.high == pytest.approx(found.value)


def test_shards_of_equal_size_have_no_slope() -> None:
    found = estimate_total([1.0, 3.0] * 5, [10] * 10, 20, 200)
    assert found.value == pytest.approx(40)


def test_one_shard_tells_no_interval() -> None:
    found = estimate_total([7], [10], 3, 30)
    assert (found.value, found.low, found.high) == (21.0, None, None)


def test_nothing_seen_is_not_nothing_there() -> None:
    assert none_seen(300, 10_000).high == 100
    assert none_seen(1, 50).high == 50


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (19, 2.0930)]
)
def test_student(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, rel=0.002)


def test_the_same_seed_chooses_the_same_shards() -> None:
    assert choose(1000, 20, 3) == choose(1000, 20, 3)
    assert choose(1000, 20, 3) != choose(1000, 20, 4)
    assert len(set(choose(1000, 20, 3))) == 20
    assert choose(5, 20, 3) == [0, 1, 2, 3, 4]
