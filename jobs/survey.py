"""Reads a few shards, and of their pictures the headers alone: how many tiles there will be.

A picture's tile count is known before it is decoded, so several ways of tiling are counted at once.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chunks import CountedTiles, count_chunks
from pipeline.pictures import PictureError, picture_size
from pipeline.records import Shard
from pipeline.samples import GroupRow, ReadSettings, read_groups
from pipeline.tiling import Tiling, plan_tiles

SAY_SECONDS = 5.0


@dataclass(frozen=True)
class Counted:
    """One way of tiling, in one shard. `chunks`: tiles of a chunk → number of chunks."""

    pictures: int
    tiles: int
    tile_counts: Counter[int]
    chunks: dict[int, int]


@dataclass(frozen=True)
class ShardCount:
    """What one shard holds. One that would not be committed counts for nothing but its bytes."""

    name: str
    num_bytes: int
    samples: int
    rejects: Counter[str]
    ways: tuple[Counted, ...]
    failure: str | None = None


@dataclass
class Survey:
    """Shards that were read; `kept` are some of their pictures, encoded, with what they carry."""

    shards: list[ShardCount] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    read_seconds: float = 0.0
    read_cpu_seconds: float = 0.0


def survey(
    shards: Sequence[tuple[Shard, int]],
    settings: ReadSettings,
    ways: Sequence[Tiling],
    chunk_sizes: Sequence[int],
    max_reject_rate: float,
    keep: int,
    seed: int,
    say: Callable[[str], None],
) -> Survey:
    """Reads shards (with their sizes) whole; keeps `keep` of their pictures, any as likely."""
    found = Survey()
    keeper = Keeper(keep, seed)
    due = time.monotonic() + SAY_SECONDS
    for number, (shard, size) in enumerate(shards, 1):
        count = _count(shard, size, settings, ways, chunk_sizes, keeper, found)
        found.shards.append(_judged(count, max_reject_rate))
        if time.monotonic() >= due or number == len(shards):
            due = time.monotonic() + SAY_SECONDS
            seen = sum(count.num_bytes for count in found.shards)
            say(f"read {number} of {len(shards)} shards, {seen / 1e6:,.0f} MB")
    found.kept = keeper.kept
    return found


class Keeper:
    """Keeps some of all that passes, any as likely (reservoir sampling, algorithm R)."""

    def __init__(self, keep: int, seed: int) -> None:
        self.kept: list[dict[str, Any]] = []
        self._keep = keep
        self._passed = 0
        self._random = random.Random(seed)  # noqa: S311 no secret

    def offer(self, sample: dict[str, Any]) -> None:
        self._passed += 1
        if len(self.kept) < self._keep:
            self.kept.append(sample)
        elif (at := self._random.randrange(self._passed)) < self._keep:
            self.kept[at] = sample


def _count(
    shard: Shard,
    size: int,
    settings: ReadSettings,
    ways: Sequence[Tiling],
    chunk_sizes: Sequence[int],
    keeper: Keeper,
    survey: Survey,
) -> ShardCount:
    rejects: Counter[str] = Counter()
    groups: list[list[CountedTiles]] = [[] for _ in ways]  # tile counts of each group
    samples, failure = 0, None
    began, cpu = time.perf_counter(), time.process_time()
    for group in read_groups(shard, settings):
        survey.read_seconds += time.perf_counter() - began
        survey.read_cpu_seconds += time.process_time() - cpu
        counts = _headers(group, ways, rejects, keeper)
        for way, tiles in zip(groups, counts, strict=True):
            way.append(tiles)
        if group.head.end is not None:
            samples, failure = group.head.end.samples, group.head.end.failure
        began, cpu = time.perf_counter(), time.process_time()
    counted = tuple(
        Counted(
            pictures=sum(map(len, way)),
            tiles=sum(map(sum, way)),
            tile_counts=Counter(tiles for group in way for tiles in group),
            chunks={n: sum(count_chunks(group, n) for group in way) for n in chunk_sizes},
        )
        for way in groups
    )
    return ShardCount(shard.name, size, samples, rejects, counted, failure)


def _headers(
    group: GroupRow, ways: Sequence[Tiling], rejects: Counter[str], keeper: Keeper
) -> list[CountedTiles]:
    """Tile counts of a group's pictures, for each way; the first way decides what is a reject."""
    for reject in group.rejects.to_pylist():
        rejects[f"{reject['stage']}/{reject['error']}"] += 1
    counts: list[CountedTiles] = [[] for _ in ways]
    for sample in group.samples.to_pylist():
        try:
            width, height = picture_size(sample["data"])
            tiles = [_tiles(width, height, way) for way in ways]
            if tiles[0] is None:
                plan_tiles(width, height, ways[0])
        except PictureError as error:
            rejects[f"{error.stage}/{error.code}"] += 1
            continue
        keeper.offer(sample)
        for way, found in zip(counts, tiles, strict=True):
            if found is not None:
                way.append(found)
    return counts


def _tiles(width: int, height: int, way: Tiling) -> int | None:
    """None where the picture would be a reject."""
    try:
        return plan_tiles(width, height, way).tile_count
    except PictureError:
        return None


def _judged(count: ShardCount, max_reject_rate: float) -> ShardCount:
    """As the job would judge it: a shard that fails gives nothing."""
    failure = count.failure
    rejected = count.rejects.total()
    if failure is None and rejected > max_reject_rate * count.samples:
        failure = f"{rejected} of {count.samples} samples rejected, above max_reject_rate"
    if failure is None:
        return count
    nothing = tuple(Counted(0, 0, Counter(), dict.fromkeys(w.chunks, 0)) for w in count.ways)
    return ShardCount(count.name, count.num_bytes, 0, Counter(), nothing, failure)
