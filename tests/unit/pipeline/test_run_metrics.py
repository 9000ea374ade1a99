"""What rows, shards and commits add to the metrics, by value."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.ledger import CompleteShard
from pipeline.metrics import METRICS
from pipeline.records import Compute, Head, Part, Seconds, ShardEnd, Work
from pipeline.run_metrics import FLUSH_SECONDS, Living, RunMetrics
from tests.book import Book
from tests.unit.pipeline.test_commits import commit

GPU = Compute("a GPU", 2, "sdpa", 8)
TILE_FLOP = 10


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_metrics(
    shards: int = 4, peak: float | None = 100.0, living: Living = lambda: {"a"}
) -> tuple[RunMetrics, Book, Clock]:
    def peak_flops(device: str, dtype: str) -> float | None:
        assert (device, dtype) == ("a GPU", "bfloat16")
        return peak

    book, clock = Book(), Clock()
    metrics = RunMetrics(book, shards, TILE_FLOP, "bfloat16", peak_flops, living, clock)
    return metrics, book, clock


def part(work: Work | None = None, **fields: object) -> Part:
    head = Head("s", "s.tar", 0, 0, True, ShardEnd(7, 500, None), Seconds(1, 2, 3, 4), GPU, work)
    made = Part(head, "f", 7, 20, {"decode/truncated": 2, "read/no-image": 1}, 10)
    return replace(made, **fields)  # type: ignore[arg-type]


def test_a_written_chunk_adds_its_tiles_pictures_rejects_and_seconds() -> None:
    metrics, book, _ = run_metrics()
    metrics.part(part())
    metrics.part(part(rejects={}, samples=5, tiles=5, reused=3))
    metrics.flush()
    assert book.counters == {
        "tiles": 25,
        "reused_tiles": 3,
        "pictures": 4 + 5,
        "rejects decode truncated": 2,
        "rejects read no-image": 1,
        "stage_seconds read": 2,
        "stage_seconds tile": 4,
        "stage_seconds embed": 6,
        "stage_seconds write": 8,
    }


def test_a_committed_shard_adds_bytes_and_the_seconds_of_its_last_task() -> None:
    metrics, book, _ = run_metrics()
    metrics.part(part())
    metrics.shard(CompleteShard("a", "a.tar", ShardEnd(7, 500, None), (part(),)))
    metrics.committed(commit("a"))  # says write=4, as the chunk did: the last task took no time
    again = commit("b").model_copy(
        update={"seconds": commit("b").seconds.model_copy(update={"write": 6.5})}
    )
    metrics.shard(CompleteShard("b", "b.tar", ShardEnd(7, 300, None), (part(),)))
    metrics.committed(again)
    metrics.flush()
    assert book.counters["read_bytes"] == 800
    assert book.counters["output_bytes"] == 2
    assert book.counters["stage_seconds write"] == 4 + 2.5
    assert book.counters["shards committed"] == 2
    assert book.gauges["shards_pending"] == 2


def test_a_failed_shard_adds_neither_bytes_nor_a_commit() -> None:
    metrics, book, _ = run_metrics()
    end = ShardEnd(0, 500, None, failure="cut")
    metrics.shard(CompleteShard("a", "a.tar", end, (part(),)))
    metrics.failed("a")
    metrics.failed("never-came")
    metrics.flush()
    assert book.counters == {"shards failed": 2}
    assert book.gauges["shards_pending"] == 2


def test_deaths_are_counted_by_stage_when_their_shard_is_complete() -> None:
    metrics, book, _ = run_metrics()
    head = replace(part().head, tile_deaths=2, embed_deaths=1)
    metrics.shard(CompleteShard("a", "a.tar", ShardEnd(7, 500, None), (part(head=head),)))
    metrics.flush()
    assert (book.counters["deaths tile"], book.counters["deaths embed"]) == (2, 1)


def test_a_replica_is_told_busy_starved_and_against_its_ceiling() -> None:
    metrics, book, clock = run_metrics()
    metrics.part(part(Work("n1", "a", 16, 1.0, 3.0)))
    clock.now += 10
    metrics.part(part(Work("n1", "a", 4, 1.0, 1.0)))
    metrics.part(part(Work("n2", "b", 8, 2.0, 0.0)))
    metrics.flush()
    assert book.counters["replica_tiles n1 a"] == 20
    assert book.counters["replica_seconds n1 a busy"] == 2
    assert book.counters["replica_seconds n1 a starved"] == 4
    assert "replica_seconds n2 b starved" not in book.counters
    assert book.gauges["replicas"] == 2
    assert book.gauges["replica_busy_share n1 a"] == pytest.approx(2 / 6)
    assert book.gauges["replica_starved_share n1 a"] == pytest.approx(4 / 6)
    assert book.gauges["replica_tiles_per_second n1 a"] == pytest.approx(20 / 6)
    # 20 tiles of 10 FLOP in 2 s, on two GPUs of 100 FLOP/s
    assert book.gauges["replica_ceiling_share n1 a"] == pytest.approx(20 * 10 / 2 / 200)
    assert book.gauges["batch_fill n1 a"] == pytest.approx(20 / 24)  # 16 of 16, 4 of 8
    assert book.gauges["replica_busy_share n2 b"] == 1


def test_without_a_known_peak_no_share_of_it_is_told() -> None:
    metrics, book, _ = run_metrics(peak=None)
    metrics.part(part(Work("n1", "a", 16, 1.0, 3.0)))
    metrics.flush()
    assert "replica_busy_share n1 a" in book.gauges
    assert not [name for name in book.gauges if name.startswith("replica_ceiling")]


def test_a_replica_that_hears_nothing_is_told_starved_while_the_run_lives() -> None:
    metrics, book, clock = run_metrics()
    metrics.part(part(Work("n1", "a", 16, 19.0, 1.0)))
    for silence, starved in ((0, 1), (38, 1), (39, 40), (121, 122), (1399, 1400)):
        clock.now = Clock.now + silence
        metrics.flush()
        assert book.gauges["replicas"] == 1
        share = starved / (19 + starved)
        assert book.gauges["replica_starved_share n1 a"] == pytest.approx(share)
        assert book.gauges["replica_busy_share n1 a"] == pytest.approx(1 - share)
        assert book.gauges["replica_tiles_per_second n1 a"] == pytest.approx(16 / (19 + starved))
    # The next chunk says the same: nothing jumps.
    metrics.part(part(Work("n1", "a", 16, 1.0, 1398.0)))
    metrics.flush()
    assert book.gauges["replica_starved_share n1 a"] == pytest.approx(1398 / 1399)
    assert book.counters["replica_seconds n1 a starved"] == 1399


def test_chunks_of_less_than_a_second_are_no_stall_until_ten_are_over() -> None:
    metrics, book, clock = run_metrics()
    metrics.part(part(Work("n1", "a", 16, 0.5, 0.0)))
    clock.now += 10
    metrics.flush()
    assert book.gauges["replica_starved_share n1 a"] == 0
    clock.now += 0.5
    metrics.flush()
    assert book.gauges["replica_starved_share n1 a"] == pytest.approx(10.5 / 11)


def test_a_replica_that_is_gone_is_told_no_more() -> None:
    asked = []

    def living() -> set[str]:
        asked.append(clock.now)
        return {"b"}

    metrics, book, clock = run_metrics(living=living)
    metrics.part(part(Work("n1", "a", 16, 19.0, 1.0)))
    metrics.part(part(Work("n2", "b", 16, 19.0, 1.0)))
    clock.now += 38
    metrics.flush()
    assert book.gauges["replicas"] == 2
    assert asked == [], "none is silent"
    book.gauges.clear()
    clock.now += 1
    metrics.flush()
    assert asked == [clock.now]
    assert book.gauges["replicas"] == 1
    assert not [name for name in book.gauges if name.endswith(" n1 a")]
    assert "replica_starved_share n2 b" in book.gauges


def test_the_pace_of_the_run_and_the_time_that_is_left() -> None:
    metrics, book, clock = run_metrics(shards=4)
    metrics.flush()
    assert "seconds_left" not in book.gauges
    assert book.gauges["tiles_per_second"] == 0
    metrics.part(part(tiles=30))
    clock.now += 10
    metrics.part(part(tiles=50))
    metrics.failed("a")
    metrics.flush()
    assert book.gauges["tiles_per_second"] == 5  # 50 in 10 s; the first row's time is not known
    assert book.gauges["seconds_left"] == 30
    clock.now += 200
    metrics.flush()
    assert book.gauges["tiles_per_second"] == 0


def test_rows_are_gathered_and_handed_on_every_few_seconds() -> None:
    metrics, book, clock = run_metrics()
    metrics.part(part())
    metrics.tick()
    assert not book.counters
    clock.now += FLUSH_SECONDS
    metrics.tick()
    assert book.counters["tiles"] == 20
    clock.now += FLUSH_SECONDS
    metrics.tick()
    assert book.counters["tiles"] == 20


def test_names_are_those_that_prometheus_will_see() -> None:
    assert len({metric.exported for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.exported.startswith("ray_tessera_")
        assert metric.exported.endswith("_total") == (metric.kind == "counter")
        assert metric.description.endswith(".")
