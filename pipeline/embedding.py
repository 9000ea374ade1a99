"""From a chunk of tiles to its embeddings, and from those to a part file."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chunks import Chunk
from pipeline.commits import RUNS
from pipeline.records import (
    Head,
    Part,
    Reject,
    Row,
    Seconds,
    embedding_schema,
    from_ipc,
    one_row,
    rejects_table,
    to_ipc,
)
from pipeline.storage import Storage, join

Encode = Callable[[npt.NDArray[np.uint8]], Mapping[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Embedded:
    """A chunk's rows with their features in float32, and all its rejects.

    `reused` of the rows were not computed.
    """

    head: Head
    rows: pa.Table
    rejects: pa.Table
    reused: int = 0

    def dump(self) -> Row:
        return one_row(
            head=self.head.dump(),
            rows=to_ipc(self.rows),
            rejects=to_ipc(self.rejects),
            reused=np.array(self.reused),
        )

    @staticmethod
    def load(row: Row) -> Embedded:
        return Embedded(
            Head.load(row["head"][0]),
            from_ipc(row["rows"][0]),
            from_ipc(row["rejects"][0]),
            int(row["reused"][0]),
        )


@dataclass(frozen=True)
class PartSettings:
    """Where part files go and what their columns are. `features` gives each one's width D."""

    storage: Storage
    output: str
    run: str
    features: Mapping[str, int]
    embedding_dtype: str
    carry: tuple[str, ...]

    @property
    def folder(self) -> str:
        return join(self.output, RUNS, self.run, "parts")


def embed_chunk(chunk: Chunk, encode: Encode, settings: PartSettings) -> Embedded:
    """Runs the encoder over a chunk. A picture with a value that is not finite becomes a reject."""
    began = time.perf_counter()
    computed = encode(chunk.tiles) if len(chunk.tiles) else {}
    rows, finite = _with_features(chunk, computed, settings)
    kept, dropped = _without(
        rows, ~finite, "embed", "non-finite", "the model gave a value that is not finite"
    )
    seconds = chunk.head.seconds + Seconds(embed=time.perf_counter() - began)
    return Embedded(
        replace(chunk.head, seconds=seconds),
        kept,
        pa.concat_tables([chunk.rejects, dropped]),
        0 if chunk.known is None else chunk.known.num_rows,
    )


def reject_chunk(chunk: Chunk, settings: PartSettings, message: str) -> Embedded:
    """Gives a chunk up: each picture that was to be computed becomes a reject (stage `embed`,
    `replica-died`)."""
    values = {name: np.full((len(chunk.tiles), w), np.nan) for name, w in settings.features.items()}
    rows, known = _with_features(chunk, values, settings)
    kept, dropped = _without(rows, ~known, "embed", "replica-died", message)
    reused = 0 if chunk.known is None else chunk.known.num_rows
    return Embedded(chunk.head, kept, pa.concat_tables([chunk.rejects, dropped]), reused)


def _with_features(
    chunk: Chunk, computed: Mapping[str, npt.NDArray[Any]], settings: PartSettings
) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """All rows with what was computed for their tiles [n, D] or was known; which are finite."""
    num_rows = chunk.rows.num_rows
    known = np.zeros(num_rows, dtype=bool)
    if chunk.known is not None:
        known[chunk.known["row"].to_numpy()] = True
    finite = np.ones(num_rows, dtype=bool)
    rows = chunk.rows
    for name, width in settings.features.items():
        values = np.empty((num_rows, width), np.float32)
        if chunk.known is not None:
            values[known] = feature_values(chunk.known[name], width)
        if len(chunk.tiles):
            assert computed[name].shape == (len(chunk.tiles), width), (name, computed[name].shape)
            values[~known] = computed[name]
        finite &= np.isfinite(values).all(axis=1)
        rows = rows.append_column(name, _vectors(values))
    schema = embedding_schema(settings.features, "float32", settings.carry)
    return rows.select(schema.names).cast(schema), finite


def write_part(embedded: Embedded, settings: PartSettings) -> Part:
    """Writes the embeddings in their final type, as an Arrow file of this run.

    A picture with a value that the type cannot hold becomes a reject (`write`, `overflow`). A
    storage that fails for good is told in the part's `failure`: it ends the shard, not the job.
    """
    began = time.perf_counter()
    rows, overflow = _narrow(embedded.rows, settings)
    kept, dropped = _without(
        rows, overflow, "write", "overflow", f"a value does not fit {settings.embedding_dtype}"
    )
    rejects = pa.concat_tables([embedded.rejects, dropped])
    head = embedded.head
    file = part_file(head)
    # One file, one request: the rejects ride along in the schema.
    data = to_ipc(kept.replace_schema_metadata({"rejects": to_ipc(rejects)}))
    failure = None
    try:
        settings.storage.publish_bytes(join(settings.folder, file), data)
    except OSError as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = head.seconds + Seconds(write=time.perf_counter() - began)
    codes = zip(rejects["stage"].to_pylist(), rejects["error"].to_pylist(), strict=True)
    return Part(
        head=replace(head, seconds=seconds),
        file=file,
        samples=len(pc.unique(kept["sample_index"])) + rejects.num_rows,
        tiles=kept.num_rows,
        rejects=dict(Counter(f"{stage}/{error}" for stage, error in codes)),
        num_bytes=len(data),
        failure=failure,
        crc32=zlib.crc32(data),
        reused=embedded.reused,
        tile_counts=_tile_counts(kept),
    )


def _tile_counts(rows: pa.Table) -> dict[str, int]:
    """Pictures by their number of tiles: each has one tile of index 0."""
    firsts = rows.filter(pc.equal(rows["tile_index"], 0))["tile_count"]
    return {str(count): times for count, times in sorted(Counter(firsts.to_pylist()).items())}


def part_folder(shard: str) -> str:
    """A flat name: the parts of shard `a` must not lie above those of shard `a/b`."""
    return hashlib.sha256(shard.encode()).hexdigest()[:20]


def part_file(head: Head) -> str:
    return f"{part_folder(head.shard)}/{head.group:06d}-{head.chunk:06d}.arrow"


def _narrow(rows: pa.Table, settings: PartSettings) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """The rows in their final type, and which of them it cannot hold."""
    overflow = np.zeros(rows.num_rows, dtype=bool)
    for name, width in settings.features.items():
        with np.errstate(over="ignore"):
            narrow = feature_values(rows[name], width).astype(settings.embedding_dtype)
        overflow |= ~np.isfinite(narrow).all(axis=1)
        rows = rows.set_column(rows.column_names.index(name), name, _vectors(narrow))
    schema = embedding_schema(settings.features, settings.embedding_dtype, settings.carry)
    return rows.cast(schema), overflow


def read_part(part: Part, settings: PartSettings) -> tuple[pa.Table, pa.Table]:
    """The rows and the rejects of a part file.

    Raises:
        OSError: it cannot be read, or is not what was written.
    """
    table = from_ipc(settings.storage.read(join(settings.folder, part.file), part.crc32))
    rejects = from_ipc(table.schema.metadata[b"rejects"])
    return table.replace_schema_metadata(None), rejects


def feature_values(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.floating]:
    """A feature's column as an array [n, D], without a copy where it is one piece."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    shaped: npt.NDArray[np.floating] = values.reshape(-1, width)
    return shaped


def _vectors(values: npt.NDArray[np.floating]) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _without(
    rows: pa.Table, bad: npt.NDArray[np.bool_], stage: str, error: str, message: str
) -> tuple[pa.Table, pa.Table]:
    """Takes whole pictures out where one of their tiles is bad, and gives a reject for each."""
    if not bad.any():
        return rows, rejects_table([])
    samples = rows["sample_index"].to_numpy()
    keys = rows["key"].to_pylist()
    first = {int(samples[at]): keys[at] for at in np.flatnonzero(bad)}
    lost = [Reject(key, index, "", stage, error, message) for index, key in sorted(first.items())]
    return rows.filter(pa.array(~np.isin(samples, list(first)))), rejects_table(lost)
