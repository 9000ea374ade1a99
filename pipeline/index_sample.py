"""A seeded sample of the vectors that the commits of OUTPUT hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.errors import UserError
from pipeline.commits import Commit
from pipeline.index_record import commit_digest
from pipeline.one_vector import VectorChoice
from pipeline.open_shards import OpenShard
from pipeline.printable import printable
from pipeline.read import Output, Vectors, shard_vectors
from pipeline.storage import redact
from pipeline.unit_vectors import normalized

SEED = 4711
FEWEST_SHARDS = 32  # that a sample is taken from, where there are so many


class OutputChangedError(Exception):
    """A shard is no longer of the commit that was planned with."""


@dataclass(frozen=True)
class VectorSource:
    """Which vector of each picture of OUTPUT."""

    output: Output
    feature: str
    choice: VectorChoice

    @property
    def width(self) -> int:
        return self.output.width(self.feature)


@dataclass(frozen=True)
class PlannedShard:
    """A committed shard: how many pictures it has, and the digest of its commit."""

    name: str
    pictures: int
    commit: str

    @staticmethod
    def of(commit: Commit) -> PlannedShard:
        return PlannedShard(commit.shard, commit.samples - commit.rejects, commit_digest(commit))

    def check(self, opened: OpenShard | None) -> OpenShard:
        """Raises OutputChangedError where the shard is another one now, or none."""
        if opened is None or commit_digest(opened.commit) != self.commit:
            raise OutputChangedError(self.name)
        return opened


def planned_vectors(
    shard: PlannedShard, opened: OpenShard | None, source: VectorSource, carried: Sequence[str] = ()
) -> Iterator[Vectors]:
    """The vectors of a shard's pictures, in order.

    Raises:
        OutputChangedError: the shard is no longer what was planned with.
        UserError: they are not as many as its commit says, or not finite.
    """
    seen = 0
    where = printable(f"{redact(source.output.folder)}: shard {shard.name}")
    for run in shard_vectors(
        shard.check(opened), source.output, source.feature, source.choice, carried
    ):
        if not np.isfinite(run.values).all():
            raise UserError(f"{where}: {source.feature} is not finite; see `tessera verify`")
        seen += len(run.values)
        yield run
    if seen != shard.pictures:
        raise UserError(
            f"{where}: {seen} pictures, its commit has {shard.pictures}; see `tessera verify`"
        )


@dataclass(frozen=True)
class Sample:
    """Unit vectors [n, D] in float16, and whose they are."""

    vectors: npt.NDArray[np.float16]
    shards: list[str]
    sample_indices: npt.NDArray[np.int64]


def sample_places(
    shards: Sequence[PlannedShard], wanted: int
) -> dict[PlannedShard, npt.NDArray[np.int64]]:
    """Which pictures of which shards: each shard's, by number, in order."""
    rng = np.random.default_rng(SEED)
    chosen: list[PlannedShard] = []
    total = 0
    for number in rng.permutation(len(shards)):
        if len(chosen) >= FEWEST_SHARDS and total >= wanted:
            break
        chosen.append(shards[number])
        total += shards[number].pictures
    if not chosen:
        return {}
    chosen.sort(key=lambda shard: shard.name)
    picked = np.sort(rng.choice(total, min(wanted, total), replace=False))
    ends = np.cumsum([shard.pictures for shard in chosen])
    runs = np.split(picked, np.searchsorted(picked, ends[:-1]))
    return {
        shard: run - (end - shard.pictures)
        for shard, run, end in zip(chosen, runs, ends, strict=True)
        if len(run)
    }


def take_sample(source: VectorSource, shards: Sequence[PlannedShard], wanted: int) -> Sample:
    """Memory: the sample, and a row group.

    Raises:
        OutputChangedError: a shard is no longer what was planned with.
        UserError: it is not what its commit says; see `planned_vectors`.
    """
    places = sample_places(shards, wanted)
    count = sum(map(len, places.values()))
    vectors = np.empty((count, source.width), np.float16)
    names: list[str] = []
    indices = np.empty(count, np.int64)
    for shard, positions in places.items():
        with source.output.open(shard.name) as opened:
            seen = 0
            for run in planned_vectors(shard, opened, source):
                rows = positions[(positions >= seen) & (positions < seen + len(run.values))] - seen
                seen += len(run.values)
                place = slice(len(names), len(names) + len(rows))
                vectors[place] = normalized(run.values[rows])
                indices[place] = run.pictures["sample_index"].to_numpy()[rows]
                names += [shard.name] * len(rows)
    return Sample(vectors, names, indices)
