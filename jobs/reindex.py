"""`tessera reindex`: brings OUTPUT up to date with INPUT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jobs.cluster import lost_leases_explained
from jobs.config import ExtractConfig
from jobs.extract import Job, Request, Summary, open_and_clean, prepare, run_job, run_name
from jobs.reindex_plan import Rates, ReindexPlan, plan_classes
from pipeline.commits import (
    Commit,
    Dataset,
    commit_url,
    committed_shards,
    read_commits,
    read_dataset,
)
from pipeline.comparison import Comparison, Totals, compare
from pipeline.generations import objects_of
from pipeline.lease import Lease, held
from pipeline.records import Shard
from pipeline.shards import refuse_colliding
from pipeline.sources import source_infos
from pipeline.storage import Storage, explained, join, redact
from pipeline.versions import current, current_version, switch, version_folder, version_for

logger = logging.getLogger(__name__)

LOOKED_UP_AT_ONCE = 500  # shards; the lease is looked at in between
TILING = ("tiling", "max_tiles", "thumbnail", "max_upscale", "tile_size", "resize_to")


@dataclass(frozen=True)
class Wishes:
    """What `reindex` is asked beside the options of `extract`."""

    dry_run: bool = False
    prune: bool = False
    rejects: bool = False


@dataclass(frozen=True)
class Reindexed:
    """What was planned, and what was done; `run` is None after `--dry-run`. `kept` vanished shards
    were not pruned, as their source is still there. Readers were not led to another version where
    they would lose `left_behind` shards whose source is still there."""

    plan: ReindexPlan
    run: Summary | None = None
    pruned: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    switched: bool = False
    left_behind: int = 0

    @property
    def exit_status(self) -> int:
        return 0 if self.run is None else self.run.exit_status

    def to_json(self) -> dict[str, Any]:
        plan = self.plan.model_dump(mode="json")
        if self.run is None:
            return {"plan": plan}
        return {
            "plan": plan,
            **self.run.to_json(),
            "reused_tiles": self.run.reused,
            "computed_tiles": self.run.tiles - self.run.reused,
            "pruned": list(self.pruned),
            "kept": list(self.kept),
            "switched": self.switched,
            "left_behind": self.left_behind,
        }


def reindex(
    config: ExtractConfig,
    wishes: Wishes,
    tell: Callable[[ReindexPlan], None],
    local_cluster: bool = False,
) -> Reindexed:
    """Computes what is new or changed in INPUT, and takes over what is not.

    OUTPUT is held for the whole time. `tell` is called with the plan before anything is done.

    Raises:
        UserError: the request cannot be met; nothing was started.
    """
    asked = prepare(config)
    output, storage = asked.config.output, asked.storage
    version = version_for(output, asked.dataset, storage)
    folder = version_folder(output, version)
    request = replace(asked, config=asked.config.model_copy(update={"output": folder}))
    if wishes.dry_run:
        with explained("list", folder):
            committed = committed_shards(folder, storage)
        plan, _ = look(output, version, request, committed, wishes)
        tell(plan)
        return Reindexed(plan)
    run = run_name()
    with (
        held(output, run, storage) as whole,
        held_too(output, folder, run, whole, storage) as lease,
    ):
        committed = open_and_clean(request)
        plan, found = look(output, version, request, committed, wishes)
        tell(plan)
        summary = Summary(len(request.shards), len(request.shards), 0, 0, 0, {}, (), 0.0)
        if found.pending:
            above = None if lease is whole else whole
            summary = run_job(Job(request, run, lease, above), found.pending, local_cluster)
        if summary.interrupted is not None:
            return Reindexed(plan, summary)
        pruned: tuple[str, ...] = ()
        kept: tuple[str, ...] = ()
        switched, left = False, 0
        with lost_leases_explained(), explained("write to", output):
            if wishes.prune:
                pruned, kept = prune(folder, request.shards, found.vanished, lease, storage)
            if not summary.failures:  # all of INPUT is committed
                left = left_behind(output, folder, request.shards, storage)
            if not summary.failures and not left:
                whole.assure()
                switched = switch(output, version, request.dataset, storage)
        return Reindexed(plan, summary, pruned, kept, switched, left)


@contextmanager
def held_too(output: str, folder: str, run: str, lease: Lease, storage: Storage) -> Iterator[Lease]:
    """A version's own lease: an `extract` may be at work in its folder."""
    if folder == output:
        yield lease
    else:
        with held(folder, run, storage) as own:
            yield own


def look(
    output: str, version: str | None, request: Request, committed: set[str], wishes: Wishes
) -> tuple[ReindexPlan, Comparison]:
    """Compares INPUT with the commits of the folder that is worked on."""
    folder, storage, dataset = request.config.output, request.storage, request.dataset
    refuse_colliding({shard.name for shard in request.shards} | committed)
    with explained("read", folder):
        commits = read_commits(folder, sorted(committed), storage)
        infos = source_infos(request.shards, storage)
        found = compare(request.shards, infos, commits, dataset.fingerprint, wishes.rejects)
    rates = Rates.of(sums for kind, sums in found.totals.items() if kind != "new")
    read_now = current(output, storage)
    if not committed and read_now != folder:
        rates = rates_of_another(read_now, dataset, storage)
    plan = ReindexPlan(
        output=redact(output),
        folder=redact(folder),
        version=version,
        fingerprint=dataset.fingerprint,
        switches=current_version(output, storage) != version,
        classes=plan_classes(found, rates),
    )
    return plan, found


def rates_of_another(folder: str, wanted: Dataset, storage: Storage) -> Rates:
    """What the version that is read now tells of INPUT: pictures, and tiles if they are cut so."""
    totals = Totals()
    before = read_dataset(folder, storage)
    with explained("read", folder):
        for commit in read_commits(folder, sorted(committed_shards(folder, storage)), storage):
            totals.add(commit)
    rates = replace(Rates.of([totals]), device_seconds_a_tile=None)
    if any(before.settings.get(name) != wanted.settings.get(name) for name in TILING):
        rates = replace(rates, tiles_a_byte=None)
    return rates


def prune(
    folder: str, shards: Sequence[Shard], vanished: Sequence[str], lease: Lease, storage: Storage
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Removes shards that are no longer in INPUT, each commit before what it names.

    One whose tar is still where it was read stays: a listing may have been behind, or INPUT was
    given narrower than before. Gives what was removed and what stays.
    """
    pruned: list[str] = []
    kept: list[str] = []
    for gone, there in by_source(folder, vanished, shards, storage):
        names = [commit.shard for commit in gone]
        objects = [join(folder, path) for commit in gone for path in objects_of(commit)]
        lease.assure()
        storage.remove_objects(*(commit_url(folder, name) for name in names))
        storage.remove_objects(*objects)
        pruned += names
        kept += there
    for name in kept:
        logger.warning("shard %s is not in INPUT, but its tar is still there: not pruned", name)
    return tuple(pruned), tuple(kept)


def left_behind(output: str, folder: str, shards: Sequence[Shard], storage: Storage) -> int:
    """How many shards readers have now and would not have in `folder`, though their tars are still
    there: as many as INPUT is narrower than before."""
    read_now = current(output, storage)
    if read_now == folder:
        return 0
    with explained("read", read_now):
        lost = committed_shards(read_now, storage) - committed_shards(folder, storage)
        count = sum(len(there) for _, there in by_source(read_now, sorted(lost), shards, storage))
    if count:
        logger.warning(
            "%s: %d shards that readers have now are not in INPUT, and their tars are still there; "
            "readers are not led to %s before it has them: give all of INPUT, with these options",
            redact(output), count, redact(folder),
        )  # fmt: skip
    return count


def by_source(
    folder: str, names: Sequence[str], shards: Sequence[Shard], storage: Storage
) -> Iterator[tuple[list[Commit], list[str]]]:
    """Some of the names at a time: the commits of those whose tar is gone, or is in INPUT under
    another name; and those whose tar is still where their commit says.

    Where INPUT's own addresses have a query or a password, which a commit does not keep, a tar
    behind http(s) cannot be looked up, and counts as there.
    """
    in_input = {redact(shard.url) for shard in shards}
    signed = any(redact(shard.url) != shard.url for shard in shards)
    names = sorted(names)
    for start in range(0, len(names), LOOKED_UP_AT_ONCE):
        commits = list(read_commits(folder, names[start : start + LOOKED_UP_AT_ONCE], storage))
        sources = {c.shard: c.source.url for c in commits if c.source.url not in in_input}
        unknown = {name for name, url in sources.items() if signed and url.startswith("http")}
        looked_up = [Shard(url, name) for name, url in sources.items() if name not in unknown]
        infos = source_infos(looked_up, storage)
        there = {name for name, info in infos.items() if info is not None} | unknown
        yield (
            [commit for commit in commits if commit.shard not in there],
            [commit.shard for commit in commits if commit.shard in there],
        )
