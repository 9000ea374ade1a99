"""The stages as Ray Data calls them: one row in, rows out.

A module of its own, light to import: every worker process loads it, and neither torch nor Ray Data
belongs in a process that reads, tiles or writes.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.chunks import Decoder, DirectDecoder, TileSettings, failed_group, tile_group
from pipeline.commits import Commit, read_commit
from pipeline.embedding import Embedded, part_folder, write_part
from pipeline.endings import end_for_sure
from pipeline.isolation import IsolatedDecoder, IsolationError
from pipeline.ledger import CompleteShard
from pipeline.open_shards import commit_now
from pipeline.records import Row, Shard, one_row
from pipeline.replaced import mark_of, remove_older, replaced_meanwhile
from pipeline.samples import GroupRow, ReadSettings, read_groups
from pipeline.storage import join, redact
from pipeline.takeover import committed_rows, with_known
from pipeline.writers import FinalizeSettings, finalize_shard, remove_replaced

logger = logging.getLogger(__name__)

EXIT_SHORT = 71
MOST_DEATHS = 10  # workers over one group, though its pictures are decoded apart after the first

# Tiling fills what the replicas leave of the cores: where they share them, a replica whose threads
# wait for each other loses more by being interrupted than tiling gains.
TILE_NICENESS = 19
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class Attempts(Protocol):
    """Which groups were begun and not finished, beyond the life of a worker."""

    def begin(self, name: str) -> int:
        """Counts an attempt; gives the number of earlier ones that did not come to an end."""

    def finish(self, name: str) -> None: ...


def feed_stage(block: Row) -> Iterator[Row]:
    """Many shards → one row for each, in their order, so that a repetition gives the same rows."""
    for url, name, before in zip(block["url"], block["name"], block["before"], strict=True):
        yield {
            "url": np.array([url]),
            "name": np.array([name]),
            "before": np.array([before]),
        }


def read_stage(row: Row, settings: ReadSettings, output: FinalizeSettings) -> Iterator[Row]:
    """One shard → its groups, with the committed rows of their pictures where it replaces one."""
    end_for_sure()
    shard = Shard(str(row["url"][0]), str(row["name"][0]), str(row["before"][0]))
    with committed_rows(shard, output.parts, output.fingerprint) as committed:
        for group in read_groups(shard, settings):
            dumped = with_known(group, committed).dump()
            del group  # not kept while the next one is read
            yield dumped
            del dumped
            release_freed_memory()


def tile_stage(row: Row, settings: TileSettings, attempts: Attempts) -> Iterator[Row]:
    """One group → its chunks.

    A worker that died over this group, from within or from outside, has left its mark in
    `attempts`: then the pictures are decoded in a process of their own.
    """
    end_for_sure()
    keep_freed_memory()
    os.setpriority(os.PRIO_PROCESS, 0, TILE_NICENESS)  # these processes tile and do nothing else
    group = GroupRow.load(row)
    name = f"{group.head.shard} {group.head.group:06d}"
    deaths = attempts.begin(name)
    if deaths >= MOST_DEATHS:
        reason = f"{deaths} workers died over its group {group.head.group}; run the job again"
        attempts.finish(name)
        yield failed_group(group, settings, reason).dump()
        return
    try:
        with _decoder(name, deaths, settings) as decoder:
            for chunk in tile_group(group, settings, decoder):
                dumped = replace(chunk, head=replace(chunk.head, tile_deaths=deaths)).dump()
                del chunk  # its tiles are not kept while the next ones are cut
                yield dumped
                del dumped
    except (MemoryError, IsolationError):
        # Raised here it would end the whole job; Ray repeats the group in another worker.
        logger.exception("group %s: this worker is short of something, and ends", name)
        logging.shutdown()
        os._exit(EXIT_SHORT)
    attempts.finish(name)
    release_freed_memory()


@contextmanager
def _decoder(name: str, deaths: int, settings: TileSettings) -> Iterator[Decoder]:
    how = (settings.tiling, settings.deadline_seconds)
    if deaths == 0:
        direct = DirectDecoder(*how)
        try:
            yield direct
        finally:
            direct.pause()
        return
    logger.warning("group %s: workers died over it, %d so far; decoded apart", name, deaths)
    isolated = IsolatedDecoder(*how)
    try:
        yield isolated
    finally:
        isolated.close()


def write_stage(row: Row, settings: FinalizeSettings) -> Row:
    """One embedded chunk → a part file, and the small row that tells of it."""
    end_for_sure()
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


def finalize_stage(shard: CompleteShard, settings: FinalizeSettings, replaced: str = "") -> bytes:
    """One complete shard → its output and commit, in place of the one marked `replaced`; gives the
    commit.

    Raises:
        ReplacedMeanwhileError: another commit stands there.
    """
    end_for_sure()
    before = None
    if replaced:
        before = read_commit(settings.parts.output, shard.name, settings.parts.storage)
        if mark_of(before) != replaced:
            # An earlier attempt of this very task may have committed, and died.
            return _finish_earlier(before, shard, settings).dump()
    try:
        return finalize_shard(shard, settings, before).dump()
    except FileNotFoundError:
        # An earlier attempt of this very task may have committed, removed the parts, and died.
        parts = settings.parts
        commit = commit_now(parts.output, shard.name, parts.storage)
        if commit is None or commit == before:
            raise
        remove_replaced(before, commit, parts)
        return commit.dump()


def _finish_earlier(commit: Commit, shard: CompleteShard, settings: FinalizeSettings) -> Commit:
    """What an earlier attempt left to do behind its commit of the shard as it was read now."""
    source = (redact(shard.url), shard.end.size, shard.end.etag)
    found = (commit.source.url, commit.source.size, commit.source.etag)
    if (found, commit.fingerprint) != (source, settings.fingerprint):
        raise replaced_meanwhile(shard.name)
    remove_older(commit, settings.parts.layout, settings.parts.output, settings.parts.storage)
    settings.parts.storage.remove(join(settings.parts.folder, part_folder(shard.name)))
    return commit
