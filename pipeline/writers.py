"""Puts the parts of a complete shard together: output objects, rejects, and last the commit."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Commit, Computed, PartFile, Source, StageSeconds, commit_url
from pipeline.embedding import PartSettings, part_folder, read_part
from pipeline.generations import generation_of, objects_of, part_paths, rejects_path
from pipeline.lease import refuse_if_lost
from pipeline.ledger import CompleteShard
from pipeline.records import (
    REJECT_SCHEMA,
    SCHEMA_VERSION,
    TILE_FIELDS,
    Part,
    Seconds,
    embedding_schema,
)
from pipeline.storage import join, redact

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
    """Counts and digests what is written through it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
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


def finalize_shard(
    shard: CompleteShard, settings: FinalizeSettings, before: Commit | None = None
) -> Commit:
    """Publishes a shard and commits it. Memory: one row group, whatever the shard's size.

    Where there is a commit `before`, nothing that it names is touched until the new commit stands
    in its place: readers see the one or the other, whole.
    """
    commit = publish_shard(shard, settings, before)
    parts = settings.parts
    if settings.lease is not None:
        refuse_if_lost(parts.output, settings.lease, parts.storage)
    parts.storage.publish_bytes(commit_url(parts.output, shard.name), commit.dump())
    remove_replaced(before, commit, parts)
    parts.storage.remove(join(parts.folder, part_folder(shard.name)))
    return commit


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
    schema = embedding_schema(parts.features, parts.embedding_dtype, parts.carry)
    runs = cut_parts(shard.parts, settings.target_part_bytes)
    generation = 1 if before is None else generation_of(before) + 1
    published = []
    paths = part_paths(shard.name, generation, len(runs))
    for path, run in zip(paths, runs, strict=True):
        groups = _row_groups(run, rejects, settings)
        published.append(_publish(path, groups, schema, settings))
    rejects_part = None
    rejected = pa.concat_tables(rejects).sort_by("sample_index")
    if rejected.num_rows:
        path = rejects_path(shard.name, generation)
        rejects_part = _publish(path, iter([rejected]), REJECT_SCHEMA, settings)
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
    )


def cut_parts(parts: Sequence[Part], target_bytes: int) -> list[list[Part]]:
    """Splits parts into runs of at most `target_bytes`, or of one part; at least one run.

    A part without rows (all its pictures were rejected) opens no run of its own.

    Sizes are those of the part files: a table's own `nbytes` differs between versions of Arrow.
    """
    runs: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        num_bytes = part.num_bytes if part.tiles else 0
        if filled and num_bytes and filled + num_bytes > target_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(part)
        filled += num_bytes
    return runs


def _row_groups(
    run: Sequence[Part], rejects: list[pa.Table], settings: FinalizeSettings
) -> Iterator[pa.Table]:
    """The rows of a run of parts, put together to row groups; their rejects go into `rejects`."""
    for group in cut_parts(run, ROW_GROUP_BYTES):
        tables = []
        for part in group:
            rows, rejected = read_part(part, settings.parts)
            tables.append(rows)
            rejects.append(rejected)
        yield pa.concat_tables(tables).combine_chunks()


def _publish(
    path: str, tables: Iterator[pa.Table], schema: pa.Schema, settings: FinalizeSettings
) -> PartFile:
    with tempfile.TemporaryFile() as file:  # nameless: a killed task leaves nothing on its node
        sink = HashingSink(file)
        rows = _write_parquet(sink, tables, schema, settings)
        file.seek(0)
        local = Path(f"/dev/fd/{file.fileno()}")
        storage = settings.parts.storage
        storage.publish_file(join(settings.parts.output, path), local)
    return PartFile(path=path, bytes=sink.num_bytes, sha256=sink.digest.hexdigest(), rows=rows)


def _write_parquet(
    sink: HashingSink, tables: Iterator[pa.Table], schema: pa.Schema, settings: FinalizeSettings
) -> int:
    features: Mapping[str, int] = settings.parts.features
    leaves = {f"{name}.list.element" for name in features}
    small = [field.name for field in [*TILE_FIELDS, *schema] if field.name not in features]
    columns = [leaf for name in dict.fromkeys(small) for leaf in _leaves(schema, name)]
    metadata = {"tessera.fingerprint": settings.fingerprint}
    rows = 0
    with pq.ParquetWriter(
        sink,
        schema.with_metadata(metadata),
        # Embeddings are noise to a compressor, and their statistics cost four fifths of the time.
        compression={**dict.fromkeys(columns, "zstd"), **dict.fromkeys(leaves, "none")},
        write_statistics=columns,
        use_dictionary=[name for name in columns if name not in ("image_sha256",)],
    ) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table)
                rows += table.num_rows
    return rows


def _leaves(schema: pa.Schema, name: str) -> list[str]:
    if name not in schema.names:
        return []
    kind = schema.field(name).type
    return [f"{name}.list.element"] if pa.types.is_fixed_size_list(kind) else [name]
