"""Headers are counted as the job will tile, and nothing is decoded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from jobs.survey import Keeper, Survey, survey
from pipeline.chunks import TileSettings, count_chunks, tile_group
from pipeline.records import Shard
from pipeline.samples import ReadSettings, read_groups
from pipeline.tiling import Tiling
from tests.builders import picture, sample, samples, tar_bytes, write_tar
from tests.stages import STORAGE

READ = ReadSettings(STORAGE, ("jpg",))
WAYS = [Tiling("dynamic", 28, 28, max_tiles=4), Tiling("dynamic", 28, 28, max_tiles=1)]


def look(*paths: Path, keep: int = 5, ways: list[Tiling] = WAYS, rate: float = 0.25) -> Survey:
    shards = [(Shard(str(path), path.stem), path.stat().st_size) for path in paths]
    return survey(shards, READ, ways, (4, 16), rate, keep, 0, lambda line: None)


def test_counts_are_those_of_the_tiling_itself(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(150, seed=3))
    (count,) = look(path).shards
    for way, counted in zip(WAYS, count.ways, strict=True):
        for chunk_tiles in (4, 16):
            settings = TileSettings(way, (), 60.0, chunk_tiles)
            chunks = [
                chunk
                for group in read_groups(Shard(str(path), "a"), READ)
                for chunk in tile_group(group, settings)
            ]
            assert counted.chunks[chunk_tiles] == len(chunks)
            assert counted.tiles == sum(len(chunk.tiles) for chunk in chunks)
    assert count.ways[1].tile_counts == Counter({1: 150})
    assert count.ways[0].tile_counts.total() == 150
    assert len(count.ways[0].tile_counts) > 1
    assert count.samples == 150
    assert count.failure is None


def test_an_empty_group_is_one_chunk() -> None:
    assert count_chunks([], 4) == 1
    assert count_chunks([9], 4) == 1
    assert count_chunks([2, 2, 1], 4) == 2


def test_rejects_that_headers_show(tmp_path: Path) -> None:
    members = [
        *samples(8),
        *sample("x-none", b"no picture"),
        ("y-alone.txt", b"no image"),
        *sample("z-flat", picture(9000, 1)),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    big = [Tiling("dynamic", 448, 448)]
    (count,) = look(path, ways=big, rate=0.5).shards
    assert count.rejects == Counter({"decode/unidentified": 1, "read/no-image": 1})
    assert count.ways[0].pictures == 9


def test_a_shard_that_would_fail_gives_nothing(tmp_path: Path) -> None:
    whole = tar_bytes(samples(6))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    rejected = write_tar(
        tmp_path / "bad.tar", [*samples(2), *sample("x", b"1"), *sample("y", b"2")]
    )
    first, second = look(cut, rejected).shards
    assert first.failure is not None
    assert "cut" in first.failure
    assert second.failure == "2 of 4 samples rejected, above max_reject_rate"
    assert [count.ways[0].tiles for count in (first, second)] == [0, 0]
    assert second.rejects == Counter()


@pytest.mark.parametrize("keep", [1, 7])
def test_any_picture_is_as_likely_to_be_kept(keep: int) -> None:
    kept: Counter[int] = Counter()
    for seed in range(2000):
        keeper = Keeper(keep, seed)
        for number in range(20):
            keeper.offer({"n": number})
        assert len(keeper.kept) == keep
        kept.update(entry["n"] for entry in keeper.kept)
    expected = 2000 * keep / 20
    assert set(kept) == set(range(20))
    assert all(0.6 * expected < times < 1.4 * expected for times in kept.values())
