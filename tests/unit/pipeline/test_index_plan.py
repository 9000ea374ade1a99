"""What an index needs to hold what is committed: by the digests of the commits alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import index_plan
from pipeline.index_kinds import choose, kind_for, segment_vectors
from pipeline.index_plan import group_shards, plan_index
from pipeline.index_record import (
    Flat,
    IndexedShard,
    IndexFile,
    IndexRecord,
    Model,
    Segment,
)
from pipeline.index_sample import PlannedShard, sample_places

FILE = IndexFile(path="p", bytes=1, sha256="0")


def shard(name: str, pictures: int = 10, commit: str = "1") -> PlannedShard:
    return PlannedShard(name, pictures, f"{name}@{commit}")


def segment(name: str, *shards: PlannedShard, dead: tuple[str, ...] = ()) -> Segment:
    starts = [sum(s.pictures for s in shards[:n]) for n in range(len(shards))]
    held = tuple(
        IndexedShard(
            shard=s.name, commit=s.commit, start=start, count=s.pictures, live=s.name not in dead
        )
        for s, start in zip(shards, starts, strict=True)
    )
    return Segment(name=name, index=FILE, pictures=FILE, nearest=FILE, found=FILE, shards=held)


def record(*segments: Segment) -> IndexRecord:
    return IndexRecord(
        schema_version=2,
        output="out",
        version=None,
        fingerprint="f",
        feature="cls",
        feature_chosen=False,
        vector="first",
        width=4,
        caption=None,
        kind_chosen=False,
        parameters=Flat(),
        model=Model(name="m", trained=None, queries=FILE),
        segments=segments,
        recall=None,
        made_at="2026-11-24T12:00:00+00:00",
    )


def names(groups: tuple[tuple[PlannedShard, ...], ...]) -> list[list[str]]:
    return [[shard.name for shard in group] for group in groups]


def plan(before: IndexRecord | None, *shards: PlannedShard) -> index_plan.IndexPlan:
    return plan_index(before, shards, Flat(), 4)


def test_nothing_to_do() -> None:
    before = record(segment("s", shard("a"), shard("b")))
    found = plan(before, shard("a"), shard("b"))
    assert (found.kept, found.groups) == (before.segments, ())
    assert (found.added, found.changed, found.removed) == ((), (), ())


def test_new_changed_and_removed_shards() -> None:
    before = record(segment("s", shard("a"), shard("b"), shard("c"), shard("d")))
    found = plan(before, shard("a"), shard("b", commit="2"), shard("c"), shard("e"))
    assert [(s.shard, s.live) for s in found.kept[0].shards] == [
        ("a", True),
        ("b", False),
        ("c", True),
        ("d", False),
    ]
    assert names(found.groups) == [["b", "e"]]
    assert (found.added, found.changed, found.removed) == (("e",), ("b",), ("d",))
    assert found.vectors_to_read == 20


def test_a_commit_that_comes_back_lives_again() -> None:
    before = record(
        segment("s", shard("a"), shard("b"), dead=("b",)), segment("t", shard("b", commit="2"))
    )
    found = plan(before, shard("a"), shard("b"))
    assert [[s.live for s in kept.shards] for kept in found.kept] == [[True, True]]
    assert (found.groups, found.added, found.changed) == ((), (), ("b",))
    removed = record(segment("s", shard("a"), shard("b"), dead=("b",)))
    back = plan(removed, shard("a"), shard("b"))
    assert (back.groups, back.added, back.changed) == ((), ("b",), ())


def test_a_segment_more_than_half_dead_is_written_again() -> None:
    before = record(segment("s", shard("a"), shard("b"), shard("c", 11)))
    half = plan(record(segment("s", shard("a"), shard("b"))), shard("a"))
    assert (len(half.kept), half.groups) == (1, ())
    found = plan(before, shard("a"), shard("x"))
    assert found.kept == ()
    assert names(found.groups) == [["a", "x"]]
    assert (found.added, found.changed, found.removed) == (("x",), (), ("b", "c"))


def test_a_shard_without_pictures_is_held_too() -> None:
    before = record(segment("s", shard("a", 0)))
    assert plan(before, shard("a", 0)).kept == before.segments


def test_very_many_small_segments_are_put_together() -> None:
    full = segment_vectors(Flat(), 4)
    big = segment("big", shard("z", full // 2))
    small = [segment(f"s{n:02}", shard(f"n{n:02}")) for n in range(index_plan.MANY_SMALL)]
    shards = [shard(f"n{n:02}") for n in range(index_plan.MANY_SMALL)]
    found = plan(record(big, *small), *shards, shard("z", full // 2))
    assert [kept.name for kept in found.kept] == ["big"]
    assert names(found.groups) == [[s.name for s in shards]]
    assert (found.added, found.changed, found.removed) == ((), (), ())
    fewer = plan(record(big, *small[1:]), *shards[1:], shard("z", full // 2))
    assert (len(fewer.kept), fewer.groups) == (index_plan.MANY_SMALL, ())


def test_groups_fill_segments() -> None:
    shards = [
        shard(name, pictures) for name, pictures in zip("abcdef", [4, 5, 2, 30, 1, 9], strict=True)
    ]
    assert names(tuple(group_shards(shards, 10))) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(group_shards([], 10)) == []


@pytest.mark.parametrize(
    ("vectors", "before", "expected"),
    [
        (20_000, None, "flat"),
        (20_001, None, "hnsw"),
        (100_000, None, "hnsw"),
        (100_001, None, "ivf-pq"),
        (39_000, "flat", "flat"),
        (41_000, "flat", "hnsw"),
        (11_000, "hnsw", "hnsw"),
        (9_000, "hnsw", "flat"),
        (60_000, "ivf-pq", "ivf-pq"),
        (40_000, "ivf-pq", "hnsw"),
    ],
)
def test_the_kind_follows_the_number(vectors: int, before: str | None, expected: str) -> None:
    assert kind_for(vectors, before) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 3, 6, 80, 3200])
@pytest.mark.parametrize("vectors", [16, 50, 2_000_000])
def test_parameters_fit_any_number_and_width(vectors: int, width: int) -> None:
    found = choose("ivf-pq", vectors, width)
    assert found.kind == "ivf-pq"
    assert found.dimensions % 2 == 0
    assert found.dimensions <= max(2, width)
    assert 1 <= found.lists <= found.sample <= vectors


def test_a_sample_is_seeded_and_spread_over_many_shards(tmp_path: Path) -> None:
    shards = [shard(f"{n:03}", 100 + n) for n in range(200)]
    places = sample_places(shards, 500)
    again = sample_places(shards, 500)
    assert {s.name: p.tolist() for s, p in places.items()} == {
        s.name: p.tolist() for s, p in again.items()
    }
    assert sum(map(len, places.values())) == 500
    assert len(places) == 32
    for sampled, positions in places.items():
        assert len(set(positions.tolist())) == len(positions)
        assert positions.min() >= 0
        assert positions.max() < sampled.pictures
    everything = sample_places(shards[:3], 10_000)
    assert [p.tolist() for p in everything.values()] == [list(range(100 + n)) for n in range(3)]
