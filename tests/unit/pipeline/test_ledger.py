"""A shard is complete when all of it has come, in whatever order; nothing counts twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ledger import CompleteShard, Ledger, LedgerError
from pipeline.records import Head, Part, Seconds, ShardEnd

SAMPLES = 2  # of each part


def parts_of(shard: str, chunks: list[int]) -> list[Part]:
    """The parts of a shard whose groups have so many chunks."""
    total = SAMPLES * sum(chunks)
    parts = []
    for group, count in enumerate(chunks):
        for chunk in range(count):
            last = chunk == count - 1
            end = ShardEnd(total, 1, "e") if last and group == len(chunks) - 1 else None
            head = Head(shard, f"{shard}.tar", group, chunk, last, end, Seconds(1, 2, 3, 4))
            parts.append(Part(head, f"{group}-{chunk}", SAMPLES, 5, {"decode/truncated": 1}, 10))
    return parts


def completed(parts: list[Part]) -> CompleteShard:
    ledger = Ledger({"s"})
    (complete,) = [shard for part in parts if (shard := ledger.add(part))]
    return complete


def test_a_shard_of_two_versions_is_none() -> None:
    """Ray keeps what a dead worker had read; the object may have been replaced since."""
    first, *others = parts_of("s", [2, 1])
    other = replace(first, head=replace(first.head, version="7 old"), samples=1)
    assert completed([other, *others]).failure == (
        "the shard was replaced while it was read; run the job again"
    )
    assert completed([first, *others]).failure is None


def test_a_group_that_nothing_came_of_fails_its_shard() -> None:
    first, *others = parts_of("s", [1, 2])
    head = replace(first.head, failure="10 workers died over it")
    broken = replace(first, head=head, samples=0, tiles=0, rejects={})
    assert completed([broken, *others]).failure == "10 workers died over it"


@st.composite
def arrivals(draw: st.DrawFn) -> list[Part]:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=3))
    parts = [part for at, chunks in enumerate(shapes) for part in parts_of(f"s{at}", chunks)]
    return draw(st.permutations(parts))


@settings(deadline=None)
@given(parts=arrivals())
def test_a_shard_is_complete_with_its_last_part_in_any_order(parts: list[Part]) -> None:
    names = {part.head.shard for part in parts}
    ledger = Ledger(names)
    left = {name: sum(part.head.shard == name for part in parts) for name in names}
    for part in parts:
        name = part.head.shard
        left[name] -= 1
        complete = ledger.add(part)
        assert (complete is not None) == (left[name] == 0)
        if complete is not None:
            mine = sorted(
                (p for p in parts if p.head.shard == name),
                key=lambda p: (p.head.group, p.head.chunk),
            )
            assert complete.parts == tuple(mine)
            assert (complete.name, complete.url) == (name, f"{name}.tar")
            assert complete.seconds == Seconds(*(n * len(mine) for n in (1, 2, 3, 4)))
            assert complete.rejects == {"decode/truncated": len(mine)}
            assert complete.failure is None
        assert ledger.incomplete() == sorted(n for n, count in left.items() if count)


@settings(deadline=None)
@given(parts=arrivals(), data=st.data())
def test_while_a_part_is_missing_its_shard_is_not_complete(
    parts: list[Part], data: st.DataObject
) -> None:
    if not parts:
        return
    missing = data.draw(st.sampled_from(parts))
    ledger = Ledger({part.head.shard for part in parts})
    complete = [ledger.add(part) for part in parts if part is not missing]
    assert missing.head.shard not in {shard.name for shard in complete if shard is not None}
    assert missing.head.shard in ledger.incomplete()


def test_a_part_that_comes_twice_is_an_error() -> None:
    first, second = parts_of("s", [2])
    ledger = Ledger(["s"])
    ledger.add(first)
    with pytest.raises(LedgerError, match="s 000000-000000 came twice"):
        ledger.add(first)
    assert ledger.add(second) is not None
    with pytest.raises(LedgerError, match="not awaited"):
        ledger.add(second)


def test_a_part_of_an_unknown_shard_is_an_error() -> None:
    with pytest.raises(LedgerError, match="t 000000-000000 of a shard that is not awaited"):
        Ledger(["s"]).add(parts_of("t", [1])[0])


@pytest.mark.parametrize("samples", [SAMPLES - 1, SAMPLES + 1])
def test_samples_must_add_up(samples: int) -> None:
    (part,) = parts_of("s", [1])
    with pytest.raises(LedgerError, match=f"shard s: 2 samples read, {samples} arrived"):
        Ledger(["s"]).add(replace(part, samples=samples))


def test_a_failure_of_reading_or_writing_is_the_shards() -> None:
    first, last = parts_of("s", [2])
    ledger = Ledger(["s"])
    ledger.add(replace(first, failure="disk full"))
    complete = ledger.add(last)
    assert complete is not None
    assert complete.failure == "disk full"
    (only,) = parts_of("s", [1])
    end = ShardEnd(99, 1, None, failure="cut at byte 3")
    ledger = Ledger(["s"])
    complete = ledger.add(replace(only, head=replace(only.head, end=end), samples=0))
    assert complete is not None
    assert complete.failure == "cut at byte 3"
