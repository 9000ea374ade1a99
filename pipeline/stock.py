"""What lies in OUTPUT when a run begins: which shards are committed, and what dead runs left.

Both come from listings, a page of a thousand names a request. A listing alone never condemns
output: what seems to belong to no commit is looked up once more, by the commit's own name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.commits import COMMITS, RUNS, SIDE_BY_SIDE, commit_url
from pipeline.storage import TEMPORARY, Storage, join, redact

logger = logging.getLogger(__name__)

PUBLISHED = ("embeddings", "rejects")
LISTINGS = 8  # runs of one folder that are listed side by side
SUFFIX = re.compile(r"\.[a-z]+$")
PART_SUFFIX = re.compile(r"-\d{5}$")


@dataclass(frozen=True)
class Stock:
    """`strays` are files and folders below OUTPUT that no reader will ever be told of."""

    committed: set[str]
    strays: list[str]


def take_stock(output: str, shards: Sequence[str], storage: Storage) -> Stock:
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
    for folder, listing in zip(PUBLISHED, published, strict=True):
        for name in listing.result():
            owners = _owners(name)
            if TEMPORARY.search(name):
                strays.append(f"{folder}/{name}")
            elif committed.isdisjoint(owners):
                doubtful[f"{folder}/{name}"] = owners
    missed = _missed_commits(output, doubtful, storage)
    strays += [name for name, owners in doubtful.items() if missed.isdisjoint(owners)]
    return Stock(committed | missed, sorted(strays))


def run_folders(output: str, storage: Storage) -> list[str]:
    """What runs keep of their own below OUTPUT, one folder each."""
    names = (name.partition("/") for name in storage.iter_files(join(output, RUNS)))
    return sorted({f"{RUNS}/{run}" for run, below, _ in names if below})


def _owners(name: str) -> list[str]:
    """The shards that an object below `embeddings` or `rejects` may belong to."""
    shard = SUFFIX.sub("", name)
    return list(dict.fromkeys([shard, PART_SUFFIX.sub("", shard)]))


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
