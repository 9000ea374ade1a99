"""What a report says in numbers, gathered from commits as they go by.

Memory: two integers a commit and what is bounded (slowest shards, samples, replicas, codes), so
that an output of some hundred thousand shards can be told.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from pipeline.commits import Commit, PartFile, Source

STAGES = ("read", "tile", "embed", "write")
SLOWEST = 15
SAMPLED_PARTS = 40
SHARDS_OF_A_CODE = 3


@dataclass(frozen=True, order=True)
class SlowShard:
    """`total` are the seconds of work in all stages."""

    total: float
    name: str
    tiles: int
    samples: int
    rejects: int
    source_bytes: int
    seconds: tuple[float, ...]  # by stage


@dataclass
class ReplicaFigures:
    """What a replica did, over all shards."""

    tiles: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tiles / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class RejectShard:
    """A shard in whose rejects examples of a code are found."""

    name: str
    source: Source
    rejects_part: PartFile


@dataclass
class Figures:
    """`untold` counts commits of earlier versions, without `tile_counts` and what came with it."""

    shards: int = 0
    samples: int = 0
    tiles: int = 0
    rejects: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    device_seconds: float = 0.0
    untold: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    tile_counts: Counter[int] = field(default_factory=Counter)
    reject_codes: Counter[str] = field(default_factory=Counter)
    replicas: dict[tuple[str, str], ReplicaFigures] = field(default_factory=dict)
    devices: Counter[str] = field(default_factory=Counter)
    moments: array[int] = field(default_factory=lambda: array("q"))  # seconds since 1970
    moment_tiles: array[int] = field(default_factory=lambda: array("q"))
    slowest: list[SlowShard] = field(default_factory=list)
    sampled_parts: list[PartFile] = field(default_factory=list)
    code_shards: dict[str, list[RejectShard]] = field(default_factory=dict)
    num_parts: int = 0

    @property
    def pictures(self) -> int:
        return self.samples - self.rejects


def gather(commits: Iterable[Commit], seed: int = 0) -> Figures:
    """Adds up all commits; the slowest shards come first."""
    figures = Figures()
    chance = random.Random(seed)  # noqa: S311 which parts are looked into
    for commit in commits:
        _add_totals(figures, commit)
        _add_replicas(figures, commit)
        _add_slow(figures, commit)
        _add_code_shards(figures, commit)
        for part in commit.parts:
            if part.rows:
                _sample_part(figures, part, chance)
    figures.slowest.sort(reverse=True)
    return figures


def _add_totals(figures: Figures, commit: Commit) -> None:
    figures.shards += 1
    figures.samples += commit.samples
    figures.tiles += commit.tiles
    figures.rejects += commit.rejects
    figures.source_bytes += commit.source.size
    files = [*commit.parts, *([commit.rejects_part] if commit.rejects_part else [])]
    figures.output_bytes += sum(file.total_bytes for file in files)
    for stage in STAGES:
        figures.seconds[stage] += getattr(commit.seconds, stage)
    figures.tile_counts.update(commit.tile_counts)
    figures.reject_codes.update(commit.reject_codes)
    figures.untold += bool(commit.samples) and not (commit.tile_counts or commit.reject_codes)
    figures.moments.append(round(datetime.fromisoformat(commit.committed_at).timestamp()))
    figures.moment_tiles.append(commit.tiles)


def _add_replicas(figures: Figures, commit: Commit) -> None:
    ranks = max((how.tensor_parallel for how in commit.computed), default=1)
    for how in commit.computed:
        figures.devices[
            f"{how.device}, tensor_parallel {how.tensor_parallel}, {how.attention}"
        ] += 1
    for embedder in commit.replicas:
        who = (embedder.node, embedder.replica)
        replica = figures.replicas.setdefault(who, ReplicaFigures())
        replica.tiles += embedder.tiles
        replica.seconds += embedder.seconds
        figures.device_seconds += ranks * embedder.seconds


def _add_slow(figures: Figures, commit: Commit) -> None:
    seconds = tuple(getattr(commit.seconds, stage) for stage in STAGES)
    slow = SlowShard(
        sum(seconds), commit.shard, commit.tiles, commit.samples, commit.rejects,
        commit.source.size, seconds,
    )  # fmt: skip
    if len(figures.slowest) < SLOWEST:
        heapq.heappush(figures.slowest, slow)
    else:
        heapq.heappushpop(figures.slowest, slow)


def _add_code_shards(figures: Figures, commit: Commit) -> None:
    """Remembers the first shards with a code, to show examples from."""
    if commit.rejects_part is None:
        return
    for code in commit.reject_codes:
        shards = figures.code_shards.setdefault(code, [])
        if len(shards) < SHARDS_OF_A_CODE:
            shards.append(RejectShard(commit.shard, commit.source, commit.rejects_part))


def _sample_part(figures: Figures, part: PartFile, chance: random.Random) -> None:
    """Each part seen so far is among the sample with the same chance."""
    figures.num_parts += 1
    if len(figures.sampled_parts) < SAMPLED_PARTS:
        figures.sampled_parts.append(part)
    elif (place := chance.randrange(figures.num_parts)) < SAMPLED_PARTS:
        figures.sampled_parts[place] = part
