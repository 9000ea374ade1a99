"""Proves what a commit promises about one shard.

A problem is one line that names the file or the shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.audit_parts import (
    Seen,
    named,
    reject_problems,
    row_problems,
    run_starts,
)
from pipeline.audit_source import source_problems
from pipeline.commits import Commit, Dataset
from pipeline.formats import open_part
from pipeline.generations import generation_of, part_paths, rejects_path
from pipeline.layout import layout_of
from pipeline.parquet_format import open_parquet
from pipeline.part_copies import PartError, local_copies
from pipeline.records import REJECT_SCHEMA, SCHEMA_VERSION, Shard
from pipeline.storage import Storage


@dataclass(frozen=True)
class ShardAudit:
    """What was found in one shard. The counts are of what is there, not of what the commit says."""

    samples: int
    embedded: int
    rejects: int
    tiles: int
    problems: tuple[str, ...]


def audit_shard(
    commit: Commit,
    dataset: Dataset,
    output: str,
    sizes: Mapping[str, int],
    storage: Storage,
    source: Shard | None = None,
) -> ShardAudit:
    """Checks one committed shard.

    Args:
        sizes: in bytes, of every file below OUTPUT, by its path.
        source: the input shard to compare with; None leaves the comparison out.

    Raises:
        OSError: the storage failed for good; that says nothing about the shard.
    """
    problems = commit_problems(commit, dataset)
    seen = Seen()
    whole = True
    layout = layout_of(dataset)
    for part in (*commit.parts, *filter(None, [commit.rejects_part])):
        try:
            if part is commit.rejects_part:
                with (
                    local_copies(part, output, storage, sizes) as copies,
                    open_parquet(copies[part.path], REJECT_SCHEMA, part.rows) as rejects,
                ):
                    found = reject_problems(rejects, seen)
            else:
                with open_part(part, output, layout, storage, sizes) as opened:
                    found = row_problems(opened, layout, seen)
            problems += [f"{part.path}: {problem}" for problem in found]
        except PartError as error:
            problems.append(f"{part.path}: {error}")
            whole = False
    if whole:  # else what follows would only say again that a part is not there
        found = [*order_problems(seen), *count_problems(commit, seen)]
        found = found or told_problems(commit, seen)
        if source is not None:
            found += source_problems(commit, dataset, source, storage, seen)
        problems += [f"shard {commit.shard}: {problem}" for problem in found]
    tiles = sum(map(len, seen.index))
    return ShardAudit(commit.samples, len(seen.keys), len(seen.rejects), tiles, tuple(problems))


def commit_problems(commit: Commit, dataset: Dataset) -> list[str]:
    """What is wrong with the record itself."""
    problems = []
    if commit.fingerprint != dataset.fingerprint:
        problems.append(
            f"made with another fingerprint ({commit.fingerprint[:12]}; "
            f"dataset.json has {dataset.fingerprint[:12]})"
        )
    if commit.schema_version != SCHEMA_VERSION:
        problems.append(f"schema version {commit.schema_version}, not {SCHEMA_VERSION}")
    if (rows := sum(part.rows for part in commit.parts)) != commit.tiles:
        problems.append(f"{commit.tiles} tiles, but its parts have {rows} rows")
    rejects = 0 if commit.rejects_part is None else commit.rejects_part.rows
    if rejects != commit.rejects:
        problems.append(f"{commit.rejects} rejects, but their part has {rejects} rows")
    paths = [[published.path for published in part.objects] for part in commit.parts]
    generation = generation_of(commit)
    due = part_paths(commit.shard, generation, len(paths), layout_of(dataset))
    for part, objects in zip(commit.parts, due, strict=True):
        if not part.rows and len(objects) > 1:  # no rows, no table of them
            objects.pop()
    if not paths or paths != due:
        names = ", ".join(path for objects in paths for path in objects)
        problems.append(f"its parts have other names than the shard's: {names}")
    path = rejects_path(commit.shard, generation)
    if commit.rejects_part is not None and commit.rejects_part.path != path:
        problems.append(f"its rejects have another name: {commit.rejects_part.path}")
    return [f"commits/{commit.shard}.json: {problem}" for problem in problems]


def order_problems(seen: Seen) -> list[str]:
    """Rows stand in the tar's order, each picture's tiles together, from 0 to tile_count - 1."""
    index, tile, count = (
        np.concatenate([np.empty(0, np.int64), *pieces])
        for pieces in (seen.index, seen.tile, seen.count)
    )
    starts = run_starts(index)
    lengths = np.diff(starts, append=len(index))
    problems = []
    samples = index[starts]
    back = np.flatnonzero(np.diff(samples) <= 0)
    if len(back):
        first, second = samples[back[0]], samples[back[0] + 1]
        problems.append(f"rows out of order: sample {second} after sample {first}")
    due = np.arange(len(index)) - np.repeat(starts, lengths)
    wrong = np.flatnonzero(tile != due)
    if len(wrong):
        at = wrong[0]
        problems.append(f"sample {index[at]}: tile {tile[at]} where tile {due[at]} is due")
    wrong = np.flatnonzero(count != np.repeat(lengths, lengths))
    if len(wrong):
        at = wrong[0]
        rows = np.repeat(lengths, lengths)[at]
        problems.append(f"sample {index[at]}: {rows} rows, tile_count {count[at]}")
    return problems


def count_problems(commit: Commit, seen: Seen) -> list[str]:
    """Every sample 0..samples-1 is embedded or rejected, and none is both."""
    due = set(range(commit.samples))
    embedded, rejected = set(seen.keys), set(seen.rejects)
    wrong = {
        "neither embedded nor rejected": due - embedded - rejected,
        "both embedded and rejected": embedded & rejected,
        f"beyond the {commit.samples} samples of the commit": (embedded | rejected) - due,
    }
    return [f"{named(samples)}: {what}" for what, samples in wrong.items() if samples]


def told_problems(commit: Commit, seen: Seen) -> list[str]:
    """What the commit counts by kind is what is there; commits of earlier versions do not count."""
    rows = np.concatenate([np.empty(0, np.int64), *seen.index])
    tile_counts = Counter(np.diff(run_starts(rows), append=len(rows)).tolist())
    codes = Counter(f"{reject.stage}/{reject.error}" for reject in seen.rejects.values())
    return [
        f"{what}: {told} in the commit, {dict(sorted(found.items()))} there"
        for what, told, found in (
            ("pictures by their tiles", commit.tile_counts, tile_counts),
            ("rejects by their codes", commit.reject_codes, codes),
        )
        if told and told != found
    ]
