"""Where the trials of batch sizes end, and which one is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pytest
import torch

from model.batch_choice import BatchChoice, choose_batch


class Device:
    """Takes so many seconds for n tiles, on a clock of its own; without an entry, no memory."""

    def __init__(self, seconds: Mapping[int, float], overhead: float = 0.0) -> None:
        self.now = 1000.0
        self.tried: list[int] = []
        self._seconds, self._overhead = seconds, overhead

    def clock(self) -> float:
        return self.now

    def measure(self, n: int) -> float:
        self.tried.append(n)
        if n not in self._seconds:
            raise torch.OutOfMemoryError(f"CUDA out of memory at {n}")
        self.now += self._seconds[n] + self._overhead
        return self._seconds[n]

    def choose(self, **options: float) -> BatchChoice:
        return choose_batch(
            self.measure,
            largest=int(options.pop("largest", 64)),
            clock=self.clock,
            **options,
        )


def at_speeds(*tiles_per_second: float) -> dict[int, float]:
    """Seconds for 1, 2, 4, … tiles."""
    return {2**i: 2**i / speed for i, speed in enumerate(tiles_per_second)}


def test_the_knee() -> None:
    device = Device(at_speeds(50, 90, 120, 130, 131, 200))
    choice = device.choose()
    assert device.tried == [1, 2, 4, 8, 16]  # 32 is not tried
    assert choice.batch_tiles == 8
    assert choice.tiles_per_second == pytest.approx({1: 50, 2: 90, 4: 120, 8: 130, 16: 131})


def test_slower_is_a_knee_too() -> None:
    device = Device(at_speeds(50, 90, 60))
    assert device.choose().batch_tiles == 2
    assert device.tried == [1, 2, 4]


def test_a_batch_that_is_no_better_alone() -> None:
    """What a CPU does: all cores are busy with one tile."""
    device = Device(at_speeds(2.0, 2.01))
    assert device.choose().batch_tiles == 1
    assert device.tried == [1, 2]


@pytest.mark.parametrize(("gain", "batch_tiles"), [(1.01, 16), (1.05, 8), (1.2, 4), (3.0, 1)])
def test_gain_moves_the_knee(gain: float, batch_tiles: int) -> None:
    speeds = at_speeds(50, 90, 120, 130, 133, 134)
    assert Device(speeds).choose(gain=gain).batch_tiles == batch_tiles


def test_memory_ends() -> None:
    device = Device(at_speeds(50, 99, 190))
    choice = device.choose()
    assert device.tried == [1, 2, 4, 8]
    assert choice.batch_tiles == 4
    assert list(choice.tiles_per_second) == [1, 2, 4]


def test_one_tile_that_does_not_fit_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="out of memory at 1"):
        Device({}).choose()


def test_any_other_error_is_raised() -> None:
    def measure(n: int) -> float:
        if n == 4:
            raise RuntimeError("an illegal memory access was encountered")
        return 1.0

    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose_batch(measure, largest=64)


@pytest.mark.parametrize(
    ("largest", "tried"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4]), (8, [1, 2, 4, 8])]
)
def test_largest(largest: int, tried: list[int]) -> None:
    device = Device(at_speeds(1, 2, 4, 8, 16, 32))
    assert device.choose(largest=largest).batch_tiles == tried[-1]
    assert device.tried == tried


@pytest.mark.parametrize(
    ("budget", "tried"),
    [
        (0.0, [1]),
        (2.9, [1]),  # 1 s is over, and the next would take 2
        (3.0, [1, 2]),
        (6.9, [1, 2]),  # 3 s are over, and the next would take 4
        (7.0, [1, 2, 4]),
        (1000.0, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_no_trial_that_would_end_after_the_budget(budget: float, tried: list[int]) -> None:
    # A trial is mostly warm-up and repetition: n seconds, of which the pass takes less each time.
    seconds = at_speeds(10, 19, 36, 68, 130, 250, 480)

    def measure(n: int) -> float:
        device.now += n - seconds[n]
        return device.measure(n)

    device = Device(seconds)
    choice = choose_batch(measure, largest=64, budget_seconds=budget, clock=device.clock)
    assert device.tried == tried
    assert choice.batch_tiles == tried[-1]
    assert device.now == pytest.approx(1000 + sum(tried))


def test_the_log_says_what_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    def logged(choose: Callable[[], BatchChoice]) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, "model.batch_choice"):
            choose()
        (message,) = caplog.messages
        return message

    assert logged(Device(at_speeds(50, 99, 100)).choose) == (
        "batch_tiles: 2, 4 are hardly faster; tiles/s by batch: 1: 50.0, 2: 99.0, 4: 100.0"
    )
    assert "batch_tiles: 2, 4 do not fit;" in logged(Device(at_speeds(50, 99)).choose)
    assert "batch_tiles: 1, the largest asked for is 1;" in logged(
        lambda: Device(at_speeds(50)).choose(largest=1)
    )
    assert "batch_tiles: 1, 0.5 s of trials are over;" in logged(
        lambda: Device(at_speeds(4, 8), overhead=0.2).choose(budget_seconds=0.5)
    )
