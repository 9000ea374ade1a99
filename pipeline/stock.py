"""What lies in OUTPUT when a run begins: which shards are committed, and what dead runs left.

Both come from listings, a page of a thousand names a request. A listing alone never condemns
output: what seems to belong to no commit is looked up once more, by the commit's own name, and
where a shard's objects are not of one kind, or there are none, its commit is read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.commits import COMMITS, RUNS, SIDE_BY_SIDE, commit_url, read_commits
from pipeline.generations import EMBEDDINGS, PUBLISHED, objects_of, owners
from pipeline.layout import Layout
from pipeline.storage import TEMPORARY, Storage, join, redact

logger = logging.getLogger(__name__)

LISTINGS = 8  # runs of one folder that are listed side by side
PARQUET = Layout("parquet", {}, "float16", ())


@dataclass(frozen=True)
class Stock:
    """`strays` are files and folders below OUTPUT that no reader will ever be told of. A commit
    whose objects are gone is none: its shard is computed again."""

    committed: set[str]
    strays: list[str]


def take_stock(
    output: str, shards: Sequence[str], storage: Storage, layout: Layout = PARQUET
) -> Stock:
    """Lists OUTPUT. To be called by its only writer: what another is writing looks like a stray.

    Args:
        shards: names of the shards of INPUT, in order; they tell where listings may be cut.
    """
    bounds = [shards[len(shards) * number // LISTINGS] for number in range(1, LISTINGS)]
    bounds = sorted(set(bounds))
    with ThreadPoolExecutor(len(PUBLISHED) + 3) as pool:
        commits = pool.submit(storage.list_names, join(output, COMMITS), bounds)
        published = [pool.submit(storage.list_names, join(output, f), bounds) for f in PUBLISHED]
        runs = pool.submit(run_folders, output, storage)
        top = pool.submit(list, storage.iter_files(output, depth=1))
    strays = runs.result() + [name for name in top.result() if TEMPORARY.search(name)]
    strays += [f"{COMMITS}/{name}" for name in commits.result() if TEMPORARY.search(name)]
    committed = {name.removesuffix(".json") for name in commits.result() if name.endswith(".json")}
    doubtful: dict[str, list[str]] = {}
    generations: dict[str, int] = {}
    cut: dict[str, bool] = {}
    mixed: set[str] = set()  # committed shards that have objects of two generations, or cut and not
    embedded: Counter[str] = Counter()  # objects of each below `embeddings`
    listed = {folder: found.result() for folder, found in zip(PUBLISHED, published, strict=True)}
    for folder, names in listed.items():
        for name in names:
            found = owners(f"{folder}/{name}", layout.format)
            mine = [owner for owner in found if owner.shard in committed]
            if TEMPORARY.search(name):
                strays.append(f"{folder}/{name}")
            elif not mine:
                doubtful[f"{folder}/{name}"] = [owner.shard for owner in found]
            for shard, generation, is_cut in mine:
                if generations.setdefault(shard, generation) != generation:
                    mixed.add(shard)
                if folder == EMBEDDINGS:
                    embedded[shard] += 1
                    if cut.setdefault(shard, is_cut) != is_cut:
                        mixed.add(shard)
    missed = _missed_commits(output, doubtful, storage)
    strays += [name for name, shards in doubtful.items() if missed.isdisjoint(shards)]
    if mixed:
        strays += _replaced(output, listed, committed, mixed, storage, layout)
    # One array a feature and a table make a part, but for the arrays of no rows.
    a_part = 1 if layout.format != "npy" else len(layout.features) + 1
    odd = {shard for shard in committed if embedded[shard] == 0 or embedded[shard] % a_part}
    hollow = _without_objects(output, sorted(odd), storage)
    return Stock((committed | missed) - hollow, sorted(strays))


def run_folders(output: str, storage: Storage) -> list[str]:
    """What runs keep of their own below OUTPUT, one folder each."""
    names = (name.partition("/") for name in storage.iter_files(join(output, RUNS)))
    return sorted({f"{RUNS}/{run}" for run, below, _ in names if below})


def _replaced(
    output: str,
    listed: dict[str, list[str]],
    committed: set[str],
    mixed: set[str],
    storage: Storage,
    layout: Layout,
) -> list[str]:
    """The objects of these committed shards that their commits do not name."""
    named: set[str] = set()
    for commit in read_commits(output, sorted(mixed), storage):
        named.update(objects_of(commit))
    replaced = []
    for folder, names in listed.items():
        for name in names:
            path = f"{folder}/{name}"
            mine = {owner.shard for owner in owners(path, layout.format)} & committed
            if mine and mine <= mixed and path not in named:
                replaced.append(path)
    return replaced


def _without_objects(output: str, shards: Sequence[str], storage: Storage) -> set[str]:
    """Those whose embeddings are not there: a task of a dead run committed them after another run
    had removed what it took for a stray."""
    hollow = set()
    for commit in read_commits(output, shards, storage):
        paths = [published.path for part in commit.parts for published in part.objects]
        gone = [path for path in paths if not storage.exists(join(output, path))]
        if gone or not commit.parts:
            hollow.add(commit.shard)
            logger.warning(
                "%s: shard %s is committed, and %s is not there; it is computed again",
                redact(output), commit.shard, gone[0] if gone else "any object",
            )  # fmt: skip
    return hollow


def _missed_commits(output: str, doubtful: dict[str, list[str]], storage: Storage) -> set[str]:
    """The owners whose commits are there though the listing did not show them."""
    owners = sorted({shard for shards in doubtful.values() for shard in shards})
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        there = pool.map(lambda shard: storage.exists(commit_url(output, shard)), owners)
        missed = {shard for shard, found in zip(owners, there, strict=True) if found}
    if missed:
        logger.warning(
            "%s: the listing of its commits is behind, it lacks %s and %d more",
            redact(output), min(missed), len(missed) - 1,
        )  # fmt: skip
    return missed
