"""What comes of a job on a fleet, and the words for what limits it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs import outcome as outcomes
from jobs.bottleneck import Case, advice
from jobs.capacity import SHARD_SECONDS, Costs, Work, replica_rate
from jobs.cluster import CPU_BUFFER_BYTES, CPU_CHUNK_TILES, GPU_CHUNK_TILES
from jobs.cpu_rate import CpuRates, best_of, shared_rate
from jobs.device_rates import with_measured
from jobs.device_tables import Measured
from jobs.outcome import LOCAL_CHUNK_SECONDS, LOCAL_RUN_SECONDS, Outcome, outcome
from jobs.plan_options import Fleet
from model.errors import UserError
from model.work import V1_5
from tests.planning import COSTS, RATES, WORK, setting

CPU, H100S = Fleet(1, "cpu"), Fleet(8, "H100")


def judged(fleet: Fleet, work: Work = WORK, costs: Costs = COSTS, **changes: object) -> Outcome:
    return outcome(fleet, 1, None, work, setting(costs=costs, **changes))


def words(fleet: Fleet, work: Work, costs: Costs = COSTS, resize: str = "exact") -> str:
    found = judged(fleet, work, costs)
    return " ".join(advice(Case(found, fleet, work, costs, resize, "--max-upscale 1 leaves 50%")))


def test_chunks_are_those_of_the_job() -> None:
    assert (outcomes.GPU_CHUNK_TILES, outcomes.CPU_CHUNK_TILES) == (
        GPU_CHUNK_TILES,
        CPU_CHUNK_TILES,
    )
    assert outcomes.CPU_BUFFER_BYTES == CPU_BUFFER_BYTES


def test_eight_h100() -> None:
    found = judged(H100S)
    rate = 8 * 49.68
    assert found.bottleneck == "encoder"
    assert found.wall_seconds == pytest.approx(90 + 8e6 / rate, rel=0.001)
    assert found.device_hours == pytest.approx(8 * found.wall_seconds / 3600)
    assert found.device_price == pytest.approx(found.device_hours * 6.88)
    assert found.low_seconds == pytest.approx(90 + 8e6 / (rate * 0.7 / 0.6), rel=0.001)
    assert found.high_seconds == pytest.approx(90 + 8e6 / (rate * 0.5 / 0.6), rel=0.001)
    assert found.rate.basis == "assumed"


def test_twice_the_devices_take_half_the_time_and_the_same_price() -> None:
    one, two = judged(H100S), judged(Fleet(16, "H100"))
    assert two.wall_seconds - 90 == pytest.approx((one.wall_seconds - 90) / 2)
    assert two.replicas == 16


@pytest.mark.parametrize(
    ("fleet", "ranks", "replicas"),
    [(8, 4, 2), (12, 8, 1), (20, 4, 5), (20, 8, 2), (3, 2, 1), (16, 3, 4)],
)
def test_no_replica_lies_on_two_nodes(fleet: int, ranks: int, replicas: int) -> None:
    found = outcome(Fleet(fleet, "H100"), ranks, None, WORK, setting())
    assert found.replicas == replicas


def test_fewer_replicas_than_there_is_room() -> None:
    assert outcome(H100S, 1, 3, WORK, setting()).replicas == 3


@pytest.mark.parametrize(
    ("fleet", "ranks", "says"),
    [
        (Fleet(4, "H100"), 8, "no node with that many devices"),
        (Fleet(8, "B300"), 1, "no device 'B300'"),
    ],
)
def test_what_cannot_be_placed(fleet: Fleet, ranks: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        outcome(fleet, ranks, None, WORK, setting())


def test_a_measured_rate_takes_the_place_of_the_assumed() -> None:
    table = setting().devices
    entry = table.find("H100")
    measured = Measured(tiles_per_second=57, tflop_per_tile=11.944, source="a file")
    table = with_measured(table, entry, measured)
    found = judged(H100S, devices=table)
    assert found.rate.basis == "benchmark"
    assert found.rate.middle == pytest.approx(57, rel=0.001)
    assert found.low_seconds == found.high_seconds
    half = Measured(tiles_per_second=114, tflop_per_tile=11.944 / 2, source="another")
    table = with_measured(table, entry, half)
    scaled = judged(H100S, devices=table)
    assert scaled.rate.basis == "scaled"
    assert scaled.rate.middle == pytest.approx(57, rel=0.001)


def test_a_rate_of_two_ranks_tells_the_share_that_is_reached() -> None:
    table = setting().devices
    entry = table.find("L40S")
    rate = replica_rate(V1_5, 45, entry, 2, "bfloat16", 0.55) / 2
    measured = Measured(tiles_per_second=rate, tflop_per_tile=11.944, ranks=2, source="a run")
    table = with_measured(table, entry, measured)
    fleet = Fleet(4, "L40S")
    alone = outcome(fleet, 1, None, WORK, setting(devices=table)).rate
    assert alone.basis == "scaled"
    assert alone.middle == pytest.approx(
        replica_rate(V1_5, 45, entry, 1, "bfloat16", 0.55), rel=0.01
    )
    together = outcome(fleet, 2, None, WORK, setting(devices=table)).rate
    assert (together.basis, together.middle) == ("benchmark", rate)


def test_a_run_on_the_cores_adds_up() -> None:
    work = replace(WORK, shards=10, read_bytes=1e9, tiles=8000, chunks=260)
    found = judged(CPU, work)
    ray = 10 * SHARD_SECONDS + 250 * LOCAL_CHUNK_SECONDS
    busy = 8000 / shared_rate(RATES) + (1e9 * 1e-9 + 8000 * 0.0001) / 2 + ray
    assert found.wall_seconds == pytest.approx(LOCAL_RUN_SECONDS + 4.0 + busy)
    assert found.device_price is None
    with pytest.raises(UserError, match="give --model"):
        judged(CPU, cpu=None)


def test_tiling_that_is_ahead_works_a_part_of_the_time() -> None:
    rate = shared_rate(RATES)
    share = rate / RATES.tile_beside
    assert rate == pytest.approx(share * RATES.encode_beside + (1 - share) * RATES.encode_alone)
    assert RATES.encode_beside < rate < RATES.encode_alone


def test_tiling_that_lags_gets_the_cores_that_starved_replicas_leave() -> None:
    rates = replace(RATES, encode_alone=900.0, encode_beside=500.0, tile_beside=300.0)
    rate = shared_rate(rates)
    starved = 1 - rate / rates.encode_beside
    assert rate == pytest.approx((1 - starved) * rates.tile_beside + starved * rates.tile_alone)
    assert rates.tile_beside < rate < rates.tile_alone


def test_neither_ahead_nor_behind() -> None:
    even = CpuRates(80.0, 60.0, 500.0, 60.0, 1.0, "")
    assert shared_rate(even) == pytest.approx(60.0)


def test_the_best_turn_counts_and_pairs_stay_together() -> None:
    turns = [(40.0, 50.0, 300.0, 100.0), (80.0, 20.0, 500.0, 400.0), (70.0, 60.0, 400.0, 90.0)]
    found = best_of(turns, 3.0, "")
    assert (found.encode_alone, found.tile_alone) == (80.0, 500.0)
    assert (found.encode_beside, found.tile_beside) == (20.0, 400.0)  # gives 69.6, the last 65.5
    assert shared_rate(found) == pytest.approx(80 / 460 * 400)


def test_the_encoder_as_the_limit() -> None:
    told = words(H100S, WORK)
    assert told.startswith("The encoder is the limit, as it should be: 8xH100 embed 397 tiles/s.")
    assert "--max-upscale 1 leaves 50%" in told


def test_tiling_as_the_limit() -> None:
    slow = replace(COSTS, tile_cpu_per_tile=1.0)
    told = words(H100S, WORK, slow)
    assert told.startswith("Tiling is the limit: 176 cores cut 176 tiles/s")
    assert "--resize fast" in told
    assert "about 222 cores more" in told
    assert "--resize fast" not in words(H100S, WORK, slow, resize="fast")


def test_cores_that_are_needed_are_those_that_feed_the_devices() -> None:
    """And not those that go with a rate that too few of them are the reason of."""
    few = judged(H100S, costs=replace(COSTS, tile_cpu_per_tile=1.0))
    assert few.bottleneck == "tiling"
    assert few.cores_needed == pytest.approx(8 * 49.68 * (1.0 + 0.0001 + 12.5e-6), rel=0.001)
    enough = judged(H100S)
    assert enough.cores_needed == pytest.approx(8 * 49.68 * (0.00238 + 0.0001 + 12.5e-6), rel=0.001)


def test_machines_of_unknown_cores_limit_nothing() -> None:
    prices = setting().prices
    unknown = {**prices.devices, "H100": prices.devices["H100"].model_copy(update={"cores": None})}
    table = prices.model_copy(update={"devices": unknown})
    slow = replace(COSTS, stream_bytes_per_second=10e3)
    found = judged(H100S, costs=slow, prices=table)
    assert [limit.name for limit in found.limits] == ["encoder", "driver"]
    assert found.cores is None
    assert found.wall_seconds == pytest.approx(90 + 8e6 / (8 * 49.68), rel=0.001)


def test_the_driver_as_the_limit() -> None:
    small = replace(WORK, shards=100_000, tiles=100_000, chunks=100_000)
    told = words(Fleet(8, "H100"), small)
    assert told.startswith("The driver is the limit: ")
    assert "comes to 26 tiles/s; run 16 jobs" in told
    assert "these have 1 tiles each" in told


def test_reading_as_the_limit() -> None:
    slow = replace(COSTS, stream_bytes_per_second=10e3)
    told = words(H100S, WORK, slow)
    assert told.startswith("Reading is the limit: 44 readers of 0.01 MB/s each")


def test_a_short_run_is_mostly_its_start() -> None:
    short = replace(WORK, shards=1, read_bytes=1e8, tiles=5000, chunks=50)
    assert "The start takes 90 of 103 s" in words(H100S, short)


def test_cpu_words() -> None:
    assert words(CPU, WORK).startswith("The encoder is the limit: ")
    lag = replace(RATES, encode_alone=900.0, encode_beside=500.0, tile_beside=300.0)
    cpu = replace(setting().cpu, rates=lag)  # type: ignore[type-var]
    found = judged(CPU, cpu=cpu)
    (told, *_) = advice(Case(found, CPU, WORK, COSTS, "exact"))
    assert found.bottleneck == "tiling"
    assert told.startswith("Tiling is the limit: ")
