"""Knows when a shard is complete, and that nothing came twice.

A shard is complete when its last group is known, the last chunk of each of its groups is known, and
every chunk before those has come. The driver keeps these small rows only, never an embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.records import Part, Seconds, ShardEnd


class LedgerError(Exception):
    """The dataflow broke its promise: a chunk came twice, or for a shard that is not open."""


@dataclass(frozen=True)
class CompleteShard:
    """All parts of a shard in order, and what its reader said at the end."""

    name: str
    url: str
    end: ShardEnd
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> Seconds:
        return sum((part.head.seconds for part in self.parts), Seconds())

    @property
    def rejects(self) -> Counter[str]:
        return sum((Counter(part.rejects) for part in self.parts), Counter())

    @property
    def failure(self) -> str | None:
        """Why the shard must not be committed, if it must not."""
        reasons = [self.end.failure]
        if len({part.head.version for part in self.parts}) > 1:
            # Ray keeps what a dead worker had read, and has another read the rest.
            reasons.append("the shard was replaced while it was read; run the job again")
        for part in self.parts:
            reasons += [part.head.failure, part.failure]
        return next(filter(None, reasons), None)


@dataclass
class OpenShard:
    """A shard of which some parts are still to come."""

    parts: dict[tuple[int, int], Part] = field(default_factory=dict)
    chunks_of_group: dict[int, int] = field(default_factory=dict)
    end: ShardEnd | None = None
    num_groups: int | None = None

    def add(self, part: Part) -> None:
        head = part.head
        self.parts[head.group, head.chunk] = part
        if head.last_chunk:
            self.chunks_of_group[head.group] = head.chunk + 1
        if head.end is not None:
            self.end = head.end
            self.num_groups = head.group + 1

    def is_complete(self) -> bool:
        return (
            self.num_groups is not None
            and len(self.chunks_of_group) == self.num_groups
            and len(self.parts) == sum(self.chunks_of_group.values())
        )


class Ledger:
    """Open shards of one run."""

    def __init__(self, shards: Iterable[str]) -> None:
        self._waiting = set(shards)
        self._open: dict[str, OpenShard] = {}

    def add(self, part: Part) -> CompleteShard | None:
        """Takes a part; gives the shard when this was its last.

        Raises:
            LedgerError: the part came twice, or its shard is unknown or already complete.
        """
        head = part.head
        if head.shard not in self._waiting:
            raise LedgerError(f"part {head.chunk_id} of a shard that is not awaited")
        shard = self._open.setdefault(head.shard, OpenShard())
        if (head.group, head.chunk) in shard.parts:
            raise LedgerError(f"part {head.chunk_id} came twice")
        shard.add(part)
        if not shard.is_complete():
            return None
        del self._open[head.shard]
        self._waiting.discard(head.shard)
        assert shard.end is not None
        parts = tuple(shard.parts[at] for at in sorted(shard.parts))
        complete = CompleteShard(head.shard, head.url, shard.end, parts)
        counted = sum(part.samples for part in parts)
        if complete.failure is None and counted != shard.end.samples:
            raise LedgerError(
                f"shard {head.shard}: {shard.end.samples} samples read, {counted} arrived"
            )
        return complete

    def incomplete(self) -> list[str]:
        """Shards that are still awaited, in order of their names."""
        return sorted(self._waiting)
