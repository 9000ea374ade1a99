"""INPUT beside OUTPUT's commits: which shards are new, changed, unchanged or gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.commits import Commit
from pipeline.records import Shard
from pipeline.replaced import mark_of
from pipeline.respelled import respelled
from pipeline.storage import FileInfo, redact

CLASSES = ("new", "changed", "retry", "unchanged", "vanished")


@dataclass
class Totals:
    """Sums over some shards. `device_seconds` is what embedding `computed` tiles took; `blank` are
    shards whose size nobody tells."""

    shards: int = 0
    source_bytes: int = 0
    pictures: int = 0
    tiles: int = 0
    computed: int = 0
    device_seconds: float = 0.0
    blank: int = 0

    def add(self, commit: Commit) -> None:
        self.shards += 1
        self.source_bytes += commit.source.size
        self.pictures += commit.samples
        self.tiles += commit.tiles
        self.computed += commit.tiles - commit.reused
        devices = max((how.tensor_parallel for how in commit.computed), default=1)
        self.device_seconds += commit.seconds.embed * devices

    def add_new(self, info: FileInfo | None) -> None:
        self.shards += 1
        self.source_bytes += 0 if info is None else info.size
        self.blank += info is None


@dataclass
class Comparison:
    """What there is to do, and the sums of each class as the commits tell them.

    `changed` and `retry` (shards that are as they were, but have rejects) carry the mark of the
    commit that they replace. `vanished` are committed and not in INPUT.
    """

    new: list[Shard] = field(default_factory=list)
    changed: list[Shard] = field(default_factory=list)
    retry: list[Shard] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    totals: dict[str, Totals] = field(default_factory=lambda: {name: Totals() for name in CLASSES})

    @property
    def pending(self) -> list[Shard]:
        return sorted([*self.new, *self.changed, *self.retry], key=lambda shard: shard.name)


def compare(
    shards: Sequence[Shard],
    infos: Mapping[str, FileInfo | None],
    commits: Iterable[Commit],
    fingerprint: str,
    retry_rejects: bool = False,
) -> Comparison:
    """Puts every shard of INPUT and every commit into a class.

    Args:
        infos: what the store says now of each shard; None where it has none.
        commits: all of OUTPUT's; each is looked at once and not kept.
        fingerprint: of OUTPUT; a commit of another one is out of date.
        retry_rejects: try the rejects of unchanged shards again.

    Raises:
        UserError: a new shard's tar is committed under another name.
    """
    found = Comparison()
    waiting = {shard.name: shard for shard in shards}
    by_url: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for commit in commits:
        shard = waiting.pop(commit.shard, None)
        # What INPUT names and the store has not is gone, too: it cannot be read again.
        if shard is None or (info := infos[shard.name]) is None:
            kind = "vanished"
            found.vanished.append(commit.shard)
            by_url = by_url or {redact(shard.url): shard.name for shard in shards}
            name = by_url.get(commit.source.url, commit.shard)
            if name != commit.shard:
                twice.append((commit.shard, name))
        elif commit.fingerprint != fingerprint or is_changed(commit, info):
            kind = "changed"
            found.changed.append(replace(shard, before=mark_of(commit)))
        elif retry_rejects and commit.rejects:
            kind = "retry"
            found.retry.append(replace(shard, before=mark_of(commit)))
        else:
            kind = "unchanged"
        found.totals[kind].add(commit)
    for committed, name in twice:
        if name in waiting:
            raise respelled(waiting[name], committed)
    for name, shard in waiting.items():
        found.new.append(shard)
        found.totals["new"].add_new(infos[name])
    return found


def is_changed(commit: Commit, info: FileInfo) -> bool:
    """Another size or another etag. A store that names no versions lets only sizes differ."""
    return (commit.source.size, commit.source.etag) != (info.size, info.etag)
