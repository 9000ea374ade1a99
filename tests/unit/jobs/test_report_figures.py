"""A hundred thousand commits in bounded memory; time without its pauses; elements that escape."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.html_elements import Html, element, text
from jobs.report_figures import SAMPLED_PARTS, SLOWEST, gather
from jobs.report_time import MAX_BINS, timeline
from pipeline.commits import Commit, StageSeconds
from tests.unit.pipeline.test_commits import commit

EPOCH = 1_764_000_000


def many(count: int) -> Iterator[Commit]:
    first = commit("0")
    for number in range(count):
        when = datetime.fromtimestamp(EPOCH + 3 * number, UTC).isoformat()
        # the slowest are spread over the whole run
        seconds = StageSeconds(read=0, tile=0, embed=(number * 7919) % count, write=0)
        name = f"{number:06d}"
        yield first.model_copy(update={"shard": name, "committed_at": when, "seconds": seconds})


def test_totals_and_the_slowest_of_many_commits_in_little_memory() -> None:
    count = 20_000
    tracemalloc.start()
    figures = gather(many(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert (figures.shards, figures.tiles, figures.pictures) == (count, 2 * count, 2 * count)
    assert figures.seconds["embed"] == count * (count - 1) / 2
    assert figures.tile_counts == {1: 4 * count, 13: 2 * count}
    assert [slow.total for slow in figures.slowest] == [count - 1 - n for n in range(SLOWEST)]
    assert figures.replicas["10.0.0.1", "a-1"].tiles == 2 * count
    assert (figures.num_parts, len(figures.sampled_parts)) == (count, SAMPLED_PARTS)
    times = timeline(figures.moments, figures.moment_tiles)
    assert times is not None
    assert len(times.rates) <= MAX_BINS + 1
    assert times.totals[-1] == 2 * count
    assert times.active_seconds == 3 * (count - 1)


def test_the_sample_of_parts_comes_from_all_of_them_and_is_the_same_again() -> None:
    parts = [
        (p.path, p.rows) for p in gather(commit(f"{n:04d}") for n in range(1000)).sampled_parts
    ]
    numbers = [int(path.removeprefix("embeddings/").removesuffix(".parquet")) for path, _ in parts]
    assert 200 < sorted(numbers)[SAMPLED_PARTS // 2] < 800
    assert min(numbers) < 200
    assert max(numbers) > 800
    assert len(set(numbers)) == SAMPLED_PARTS
    again = gather(commit(f"{n:04d}") for n in range(1000)).sampled_parts
    assert [(p.path, p.rows) for p in again] == parts


def test_a_pause_is_left_out_of_the_time_in_which_shards_came() -> None:
    day = 86_400
    moments = [EPOCH + at for at in (0, 60, 120, 180, day, day + 60)]
    times = timeline(moments, [10] * 6)
    assert times is not None
    assert (times.active_seconds, times.pauses) == (240, 1)
    assert times.totals[-1] == 60
    assert sum(times.rates) * times.step == pytest.approx(60)


def test_one_moment_tells_no_pace() -> None:
    times = timeline([EPOCH, EPOCH], [5, 6])
    assert times is not None
    assert (times.active_seconds, times.totals) == (None, (11,))
    assert timeline([], []) is None


@given(st.text())
def test_text_is_never_markup(value: str) -> None:
    made = element("p", value, title=value)
    assert made.count("<") == 2
    assert made.count(">") == 2
    assert made.count('"') == 2
    assert made == f'<p title="{text(value)}">{text(value)}</p>'


def test_elements_stand_in_elements_as_they_are() -> None:
    inner = element("b", "1 < 2")
    assert element("p", inner, None, 3, class_="x") == '<p class="x"><b>1 &lt; 2</b>3</p>'
    assert isinstance(inner, Html)
    assert element("img", src="data:,", alt=None) == '<img src="data:,">'
