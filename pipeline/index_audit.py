"""Proves what the record of an index promises. A problem is one line that names what it is of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from model.errors import UserError
from pipeline.commits import RUNS
from pipeline.index_files import DIFFERS, local_file, read_faiss, read_table
from pipeline.index_record import (
    RECORD,
    IndexFile,
    IndexRecord,
    Model,
    Segment,
    digest,
    segment_path,
)
from pipeline.index_sample import PlannedShard
from pipeline.storage import Storage


def part_problems(
    index: str, part: Segment | Model, record: IndexRecord, storage: Storage
) -> list[str]:
    """What is wrong with the files of a segment or of the model.

    Raises:
        OSError: the storage failed for good; that says nothing about the index.
    """
    problems = [p for file in part.files for p in _file_problems(index, file, storage)]
    if problems or isinstance(part, Model):
        return problems
    try:
        return list(_segment_problems(index, part, record, storage))
    except UserError as error:
        return [str(error)]


def _file_problems(index: str, file: IndexFile, storage: Storage) -> Iterator[str]:
    """The file is there, and its bytes are those of the record."""
    try:
        with local_file(index, file, storage) as path, Path(path).open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                yield f"{file.path}: {DIFFERS}"
    except FileNotFoundError:
        yield f"{file.path}: missing; run `tessera index` again"
    except UserError as error:
        yield str(error)


def _segment_problems(
    index: str, segment: Segment, record: IndexRecord, storage: Storage
) -> Iterator[str]:
    """Vectors, pictures and the record's ranges of ids are of the same pictures."""
    where = segment_path(segment.name)
    vectors = read_faiss(index, segment.index, storage)
    if (vectors.ntotal, vectors.d) != (segment.vectors, record.width):
        yield (
            f"{where}.faiss: {vectors.ntotal} vectors of {vectors.d}, the record says "
            f"{segment.vectors} of {record.width}"
        )
    pictures = read_table(index, segment.pictures, storage)
    if pictures.num_rows != segment.vectors:
        yield f"{where}.parquet: {pictures.num_rows} rows, the record says {segment.vectors}"
    start = 0
    shards = np.asarray(pictures["shard"].to_pylist(), dtype=object)
    for shard in segment.shards:
        if shard.start != start:
            yield f"{RECORD}: shard {shard.shard} begins at {shard.start}, {start} is due"
        start += shard.count
        if not (shards[shard.start : shard.start + shard.count] == shard.shard).all():
            yield f"{where}.parquet: rows of shard {shard.shard} are of another"
    commits = (shard.commit for shard in segment.shards)
    if segment.name != digest(record.model.name, str(record.caption), *commits):
        yield f"{where}: its name is not the digest of what it holds"


def commit_problems(
    record: IndexRecord, version: str | None, fingerprint: str, commits: Sequence[PlannedShard]
) -> list[str]:
    """The index holds the commits that OUTPUT has, each once, and no others."""
    problems = []
    if (record.version, record.fingerprint) != (version, fingerprint):
        problems.append(
            f"{RECORD}: of fingerprint {record.fingerprint[:12]}, OUTPUT is of "
            f"{fingerprint[:12]} now; run `tessera index` again"
        )
    now = {shard.name: shard for shard in commits}
    live = [s for segment in record.segments for s in segment.shards if s.live]
    times = Counter(shard.shard for shard in live)
    problems += [f"shard {name}: {n} times in the index" for name, n in times.items() if n > 1]
    for name in sorted(now.keys() - times.keys()):
        problems.append(f"shard {name}: committed, not in the index; run `tessera index` again")
    for held in live:
        there = now.get(held.shard)
        if there is None:
            problems.append(f"shard {held.shard}: in the index, not committed any more")
        elif there.commit != held.commit:
            problems.append(f"shard {held.shard}: its commit has changed since it was indexed")
        elif there.pictures != held.count:
            due = there.pictures
            problems.append(
                f"shard {held.shard}: {held.count} vectors, its commit has {due} pictures"
            )
    return problems


def leftover_problems(record: IndexRecord, files: Mapping[str, int]) -> list[str]:
    """Files that belong to nothing, and small records that are missing."""
    due = {RECORD, *record.objects} - {file.path for file in record.files}
    problems = [
        f"{name}: missing; run `tessera index` again" for name in sorted(due - files.keys())
    ]
    for name in sorted(files.keys() - record.objects - {RECORD}):
        if name.startswith(f"{RUNS}/"):
            problems.append(f"{name}: a run is at work, or died; run `tessera index` again")
        else:
            problems.append(f"{name}: belongs to nothing; run `tessera index` again")
    return problems
