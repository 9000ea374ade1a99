"""The stages as Ray Data calls them: one row in, rows out.

A module of its own, light to import: every worker process loads it, and neither torch nor Ray Data
belongs in a process that reads, tiles or writes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.chunks import TileSettings, tile_group
from pipeline.commits import commit_url
from pipeline.embedding import Embedded, write_part
from pipeline.ledger import CompleteShard
from pipeline.records import Row, Shard, one_row
from pipeline.samples import GroupRow, ReadSettings, read_groups
from pipeline.writers import FinalizeSettings, finalize_shard

# Tiling fills what the replicas leave of the cores: where they share them, a replica whose threads
# wait for each other loses more by being interrupted than tiling gains.
TILE_NICENESS = 19
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def feed_stage(block: Row) -> Iterator[Row]:
    """Many shards → one row for each, in their order, so that a repetition gives the same rows."""
    for url, name in zip(block["url"], block["name"], strict=True):
        yield {"url": np.array([url]), "name": np.array([name])}


def read_stage(row: Row, settings: ReadSettings) -> Iterator[Row]:
    """One shard → its groups."""
    shard = Shard(str(row["url"][0]), str(row["name"][0]))
    for group in read_groups(shard, settings):
        dumped = group.dump()
        del group  # not kept while the next one is read
        yield dumped
        del dumped
        release_freed_memory()


def tile_stage(row: Row, settings: TileSettings) -> Iterator[Row]:
    """One group → its chunks."""
    keep_freed_memory()
    os.setpriority(os.PRIO_PROCESS, 0, TILE_NICENESS)  # these processes tile and do nothing else
    for chunk in tile_group(GroupRow.load(row), settings):
        dumped = chunk.dump()
        del chunk  # its tiles are not kept while the next ones are cut
        yield dumped
        del dumped
    release_freed_memory()


def write_stage(row: Row, settings: FinalizeSettings) -> Row:
    """One embedded chunk → a part file, and the small row that tells of it."""
    return one_row(part=write_part(Embedded.load(row), settings.parts).dump())


def keep_freed_memory() -> None:
    """Lets a task use its large buffers again, picture after picture, until it ends.

    glibc maps anything above 32 MiB afresh, often less, and every fresh page costs a fault: tiling
    with `fast` does 10 % more tiles a second without them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's own
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def release_freed_memory() -> None:
    """Gives what a task has freed back to the system.

    Ray keeps idle workers, and any of them may come to run any stage; without this each would hold
    on to the largest buffers it ever had. Where the C library has no `malloc_trim` it needs none.
    """
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def finalize_stage(shard: CompleteShard, settings: FinalizeSettings) -> bytes:
    """One complete shard → its output and commit; gives the commit."""
    try:
        return finalize_shard(shard, settings).dump()
    except FileNotFoundError:
        # An earlier attempt of this very task may have committed, removed the parts, and died.
        url = commit_url(settings.parts.output, shard.name)
        if settings.parts.storage.exists(url):
            return settings.parts.storage.read(url)
        raise
