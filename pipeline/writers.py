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

from pipeline.commits import (
    Commit,
    Computed,
    Embedder,
    PartFile,
    Source,
    StageSeconds,
    commit_url,
)
from pipeline.embedding import PartSettings, part_folder, read_part
from pipeline.ledger import CompleteShard
from pipeline.records import (
    REJECT_SCHEMA,
    SCHEMA_VERSION,
    TILE_FIELDS,
    Part,
    Seconds,
    Work,
    embedding_schema,
)
from pipeline.storage import join, redact

ROW_GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class FinalizeSettings:
    """fingerprint: of the dataset; target_part_bytes: size above which output is cut."""

    parts: PartSettings
    fingerprint: str
    target_part_bytes: int


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


def finalize_shard(shard: CompleteShard, settings: FinalizeSettings) -> Commit:
    """Publishes a shard and commits it. Memory: one row group, whatever the shard's size."""
    began = time.perf_counter()
    parts = settings.parts
    rejects = [REJECT_SCHEMA.empty_table()]
    schema = embedding_schema(parts.features, parts.embedding_dtype, parts.carry)
    runs = cut_parts(shard.parts, settings.target_part_bytes)
    published = []
    for number, run in enumerate(runs):
        name = f"{shard.name}-{number:05d}" if len(runs) > 1 else shard.name
        groups = _row_groups(run, rejects, settings)
        published.append(_publish(f"embeddings/{name}.parquet", groups, schema, settings))
    rejects_part = None
    rejected = pa.concat_tables(rejects).sort_by("sample_index")
    if rejected.num_rows:
        path = f"rejects/{shard.name}.parquet"
        rejects_part = _publish(path, iter([rejected]), REJECT_SCHEMA, settings)
    seconds = shard.seconds + Seconds(write=time.perf_counter() - began)
    commit = Commit(
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
        computed=tuple(
            Computed(**asdict(how))
            for how in sorted({part.head.compute for part in shard.parts if part.head.compute})
        ),
        seconds=StageSeconds(**{k: round(v, 3) for k, v in asdict(seconds).items()}),
        committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tile_counts=dict(sorted(shard.tile_counts.items())),
        reject_codes=dict(sorted(shard.rejects.items())),
        replicas=_embedders(shard.parts),
    )
    parts.storage.publish_bytes(commit_url(parts.output, shard.name), commit.dump())
    parts.storage.remove(join(parts.folder, part_folder(shard.name)))
    return commit


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
