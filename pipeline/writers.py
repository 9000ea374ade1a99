"""Puts the parts of a complete shard together: output objects, rejects, and last the commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import pyarrow as pa

from pipeline.commits import (
    Commit,
    Computed,
    Embedder,
    PartFile,
    PublishedObject,
    Source,
    StageSeconds,
    commit_url,
)
from pipeline.embedding import PartSettings, part_folder, read_part
from pipeline.formats import write_objects
from pipeline.generations import generation_of, objects_of, part_paths, rejects_path
from pipeline.layout import Layout
from pipeline.lease import refuse_if_lost
from pipeline.ledger import CompleteShard
from pipeline.parquet_format import write_parquet
from pipeline.records import (
    REJECT_SCHEMA,
    SCHEMA_VERSION,
    Part,
    Seconds,
    Work,
)
from pipeline.storage import join, redact
from pipeline.webdataset_format import tar_overhead

ROW_GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class FinalizeSettings:
    """fingerprint: of the dataset; target_part_bytes: size above which output is cut; lease: the
    number of the run's lease (None: OUTPUT is nobody else's)."""

    parts: PartSettings
    fingerprint: str
    target_part_bytes: int
    lease: int | None = None


class HashingSink:
    """Counts and digests what is written through it, into a nameless file: a killed task leaves
    nothing on its node."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._sink.write(data)

    def flush(self) -> None:
        self._sink.flush()

    def tell(self) -> int:
        return self.num_bytes

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def written(self) -> Path:
        """The file, to be read from its beginning."""
        self._sink.flush()
        self._sink.seek(0)
        return Path(f"/dev/fd/{self._sink.fileno()}")


def finalize_shard(
    shard: CompleteShard, settings: FinalizeSettings, before: Commit | None = None
) -> Commit:
    """Publishes a shard and commits it. Memory: one row group or part file, whatever its size.

    Where there is a commit `before`, nothing that it names is touched until the new commit stands
    in its place: readers see the one or the other, whole.
    """
    commit = publish_shard(shard, settings, before)
    parts = settings.parts
    _refuse_if_lost(settings)
    parts.storage.publish_bytes(commit_url(parts.output, shard.name), commit.dump())
    remove_replaced(before, commit, parts)
    parts.storage.remove(join(parts.folder, part_folder(shard.name)))
    return commit


def _refuse_if_lost(settings: FinalizeSettings) -> None:
    if settings.lease is not None:
        parts = settings.parts
        refuse_if_lost(parts.output, settings.lease, parts.run, parts.storage)


def remove_replaced(before: Commit | None, commit: Commit, parts: PartSettings) -> None:
    """Removes the objects of a commit that has been replaced."""
    if before is not None:
        old = objects_of(before).keys() - objects_of(commit).keys()
        parts.storage.remove_objects(*(join(parts.output, path) for path in sorted(old)))


def publish_shard(
    shard: CompleteShard, settings: FinalizeSettings, before: Commit | None = None
) -> Commit:
    """Publishes a shard's objects under names of their own; gives the commit that will tell of
    them."""
    began = time.perf_counter()
    parts = settings.parts
    rejects = [REJECT_SCHEMA.empty_table()]
    runs = cut_parts(shard.parts, settings.target_part_bytes, parts.layout)
    generation = 1 if before is None else generation_of(before) + 1
    published = []
    paths = part_paths(shard.name, generation, len(runs), parts.layout)
    for objects, run in zip(paths, runs, strict=True):
        tables = _tables(run, rejects, parts)
        published.append(_publish_part(objects, tables, sum(p.tiles for p in run), settings))
    rejects_part = None
    rejected = pa.concat_tables(rejects).sort_by("sample_index")
    if rejected.num_rows:
        path = rejects_path(shard.name, generation)
        rejects_part = _publish_rejects(path, rejected, settings)
    seconds = shard.seconds + Seconds(write=time.perf_counter() - began)
    reused = sum(part.reused for part in shard.parts)
    computed = {
        Computed(**asdict(part.head.compute)) for part in shard.parts if part.head.compute
    } | set(before.computed if before is not None and reused else ())
    return Commit(
        schema_version=SCHEMA_VERSION,
        fingerprint=settings.fingerprint,
        shard=shard.name,
        source=Source(url=redact(shard.url), size=shard.end.size, etag=shard.end.etag),
        samples=shard.end.samples,
        tiles=sum(part.tiles for part in shard.parts),
        rejects=shard.rejects.total(),
        truncated_at=shard.end.truncated_at,
        parts=tuple(published),
        rejects_part=rejects_part,
        computed=tuple(sorted(computed, key=lambda how: tuple(how.model_dump().values()))),
        seconds=StageSeconds(**{k: round(v, 3) for k, v in asdict(seconds).items()}),
        committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        reused=reused,
        tile_counts=dict(sorted(shard.tile_counts.items())),
        reject_codes=dict(sorted(shard.rejects.items())),
        replicas=_embedders(shard.parts),
    )


def _embedders(parts: Sequence[Part]) -> tuple[Embedder, ...]:
    done: dict[tuple[str, str], list[Work]] = {}
    for work in (part.head.work for part in parts):
        if work is not None:
            done.setdefault((work.node, work.replica), []).append(work)
    return tuple(
        Embedder(
            node=node,
            replica=replica,
            tiles=sum(work.tiles for work in works),
            seconds=round(sum(work.seconds for work in works), 3),
        )
        for (node, replica), works in sorted(done.items())
    )


def cut_parts(
    parts: Sequence[Part], target_bytes: int, layout: Layout | None = None
) -> list[list[Part]]:
    """Splits parts into runs of at most `target_bytes`, or of one part; at least one run.

    A part without rows (all its pictures were rejected) opens no run of its own.

    Sizes are those of the part files: a table's own `nbytes` differs between versions of Arrow.
    Where `layout` is one of tars, what a tar adds is reckoned in.
    """
    runs: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        num_bytes = part.num_bytes if part.tiles else 0
        if num_bytes and layout is not None and layout.format == "webdataset":
            num_bytes += tar_overhead(layout, part.tiles, sum(part.tile_counts.values()))
        if filled and num_bytes and filled + num_bytes > target_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(part)
        filled += num_bytes
    return runs


def _tables(
    run: Sequence[Part], rejects: list[pa.Table], settings: PartSettings
) -> Iterator[pa.Table]:
    """The rows of a run of parts; their rejects go into `rejects`. For Parquet's sake they are put
    together to row groups; a tar has no use for that, and takes part file after part file."""
    groups = cut_parts(run, ROW_GROUP_BYTES)
    if settings.format == "webdataset":
        groups = [[part] for part in run]
    for group in groups:
        tables = []
        for part in group:
            rows, rejected = read_part(part, settings)
            tables.append(rows)
            rejects.append(rejected)
            del rows
        yield pa.concat_tables(tables).combine_chunks() if len(tables) > 1 else tables.pop()


def _publish_part(
    paths: Sequence[str], tables: Iterator[pa.Table], num_rows: int, settings: FinalizeSettings
) -> PartFile:
    """Writes all objects of a part side by side, then publishes one after the other."""
    layout = settings.parts.layout
    if layout.format == "npy" and not num_rows:
        paths = paths[:-1]
    with ExitStack() as files:
        sinks = [HashingSink(files.enter_context(_file_for(path, settings))) for path in paths]
        rows = write_objects(sinks, tables, layout, num_rows, settings.fingerprint)
        assert rows == num_rows, f"{rows} rows where {num_rows} were announced"
        objects = [_publish(path, sink, settings) for path, sink in zip(paths, sinks, strict=True)]
    own, *beside = objects
    return PartFile(**own.model_dump(), rows=rows, beside=tuple(beside))


def _file_for(path: str, settings: FinalizeSettings) -> IO[bytes]:
    return settings.parts.storage.nameless(join(settings.parts.output, path))


def _publish_rejects(path: str, table: pa.Table, settings: FinalizeSettings) -> PartFile:
    with _file_for(path, settings) as file:
        sink = HashingSink(file)
        rows = write_parquet(sink, iter([table]), REJECT_SCHEMA, (), settings.fingerprint)
        return PartFile(**_publish(path, sink, settings).model_dump(), rows=rows)


def _publish(path: str, sink: HashingSink, settings: FinalizeSettings) -> PublishedObject:
    local = sink.written()
    storage = settings.parts.storage
    _refuse_if_lost(settings)  # a successor may have committed an object of this very name
    storage.publish_file(join(settings.parts.output, path), local)
    return PublishedObject(path=path, bytes=sink.num_bytes, sha256=sink.digest.hexdigest())
