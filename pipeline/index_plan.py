"""What there is to do to an index so that it holds the commits that OUTPUT has now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.index_kinds import segment_vectors
from pipeline.index_record import IndexRecord, Parameters, Segment
from pipeline.index_sample import PlannedShard

SMALL_SHARE = 8  # a segment below this part of a full one is small
MANY_SMALL = 16  # so many small ones are put together


@dataclass(frozen=True)
class IndexPlan:
    """`kept` segments say which of their shards are still live; the shards of each of `groups`
    become a new segment. `added` and `removed` are names of shards that the index gains and loses,
    `changed` of those it has of another commit."""

    kept: tuple[Segment, ...]
    groups: tuple[tuple[PlannedShard, ...], ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def vectors_to_read(self) -> int:
        return sum(shard.pictures for group in self.groups for shard in group)


def plan_index(
    record: IndexRecord | None,
    shards: Sequence[PlannedShard],
    parameters: Parameters,
    width: int,
) -> IndexPlan:
    """Compares the commits with the record, which is of the same model; None: there is none yet."""
    full = segment_vectors(parameters, width)
    segments = () if record is None else record.segments
    before = {shard.shard for segment in segments for shard in segment.shards if shard.live}
    now = {shard.name: shard for shard in shards}
    kept = _kept(segments, now, full)
    held = {shard.shard for segment in kept for shard in segment.shards if shard.live}
    known = {shard.commit for segment in segments for shard in segment.shards if shard.live}
    pending = [shard for shard in shards if shard.name not in held]
    fresh = [shard.name for shard in shards if shard.commit not in known]
    return IndexPlan(
        kept=kept,
        groups=tuple(group_shards(pending, full)),
        added=tuple(name for name in fresh if name not in before),
        changed=tuple(name for name in fresh if name in before),
        removed=tuple(sorted(before - now.keys())),
    )


def _kept(
    segments: Sequence[Segment], now: dict[str, PlannedShard], full: int
) -> tuple[Segment, ...]:
    """The segments that go on, with what is live of them now.

    Those of which more than half is dead are not worth keeping, nor are very many small ones: what
    is live of them is read again, into fewer.
    """
    held: set[str] = set()
    found = []
    for segment in segments:
        shards = []
        for shard in segment.shards:
            there = now.get(shard.shard)
            is_live = there is not None and there.commit == shard.commit and shard.shard not in held
            if is_live:
                held.add(shard.shard)
            shards.append(shard.model_copy(update={"live": is_live}))
        found.append(segment.model_copy(update={"shards": tuple(shards)}))
    worth = [
        segment
        for segment in found
        if any(s.live for s in segment.shards) and 2 * segment.live_vectors >= segment.vectors
    ]
    small = [segment for segment in worth if segment.vectors * SMALL_SHARE < full]
    if len(small) >= MANY_SMALL:
        worth = [segment for segment in worth if segment not in small]
    return tuple(worth)


def group_shards(shards: Sequence[PlannedShard], full: int) -> Iterator[tuple[PlannedShard, ...]]:
    """Runs of shards that fill a segment; a shard above that is one of its own."""
    group: list[PlannedShard] = []
    filled = 0
    for shard in shards:
        if group and filled + shard.pictures > full:
            yield tuple(group)
            group, filled = [], 0
        group.append(shard)
        filled += shard.pictures
    if group:
        yield tuple(group)
