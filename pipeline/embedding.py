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
from pipeline.commits import RUNS, Format
from pipeline.layout import Layout
from pipeline.records import (
    Head,
    Part,
    Reject,
    Row,
    Seconds,
    Shape,
    from_ipc,
    num_values,
    one_row,
    rejects_table,
    to_ipc,
    to_ipc_buffer,
)
from pipeline.storage import Storage, join
from pipeline.vectors import feature_values, vectors

Encode = Callable[[npt.NDArray[np.uint8]], Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Embedded:
    """A chunk's rows in their final type, and all its rejects, as the bytes of its part file.

    An Arrow stream; the rejects ride along in its schema. `reused` of the rows were not computed.
    """

    head: Head
    file: npt.NDArray[np.uint8]
    reused: int = 0

    @staticmethod
    def of(head: Head, rows: pa.Table, rejects: pa.Table, reused: int) -> Embedded:
        whole = rows.replace_schema_metadata({"rejects": to_ipc(rejects)})
        return Embedded(head, np.frombuffer(to_ipc_buffer(whole), np.uint8), reused)

    @property
    def rows(self) -> pa.Table:
        """Not a copy."""
        return from_ipc(self.file).replace_schema_metadata(None)

    @property
    def rejects(self) -> pa.Table:
        return from_ipc(from_ipc(self.file).schema.metadata[b"rejects"])

    def dump(self) -> Row:
        # An array, not bytes: those would be copied four times more on their way.
        return one_row(head=self.head.dump(), file=self.file, reused=np.array(self.reused))

    @staticmethod
    def load(row: Row) -> Embedded:
        return Embedded(Head.load(row["head"][0]), row["file"][0], int(row["reused"][0]))


@dataclass(frozen=True)
class PartSettings:
    """Where part files go, what their columns are, and the format they will be published in.

    `features` gives what each one is of a tile: D values, or tokens x D.
    """

    storage: Storage
    output: str
    run: str
    features: Mapping[str, Shape]
    embedding_dtype: str
    carry: tuple[str, ...]
    format: Format = "parquet"

    @property
    def folder(self) -> str:
        return join(self.output, RUNS, self.run, "parts")

    @property
    def layout(self) -> Layout:
        return Layout(self.format, self.features, self.embedding_dtype, self.carry)


def embed_chunk(chunk: Chunk, encode: Encode, settings: PartSettings) -> Embedded:
    """Runs the encoder over a chunk, and takes the embeddings to their final type.

    A picture with a value that is not finite becomes a reject (`embed`, `non-finite`), and so does
    one with a value that the type cannot hold (`write`, `overflow`).
    """
    began = time.perf_counter()
    computed = encode(chunk.tiles) if len(chunk.tiles) else {}
    rows, finite, fitting = _with_features(chunk, computed, settings)
    kept, infinite = _without(
        rows, ~finite, "embed", "non-finite", "the model gave a value that is not finite"
    )
    if not finite.all():
        fitting = fitting[np.isin(rows["sample_index"].to_numpy(), kept["sample_index"].to_numpy())]
    kept, too_large = _without(
        kept, ~fitting, "write", "overflow", f"a value does not fit {settings.embedding_dtype}"
    )
    rejects = pa.concat_tables([chunk.rejects, infinite, too_large])
    seconds = chunk.head.seconds + Seconds(embed=time.perf_counter() - began)
    head = replace(chunk.head, seconds=seconds)
    return Embedded.of(head, kept, rejects, _num_known(chunk))


def reject_chunk(chunk: Chunk, settings: PartSettings, message: str) -> Embedded:
    """Gives a chunk up: each picture that was to be computed becomes a reject (stage `embed`,
    `replica-died`)."""
    nothing = {
        name: np.zeros((len(chunk.tiles), num_values(shape)), settings.embedding_dtype)
        for name, shape in settings.features.items()
    }
    rows, _, _ = _with_features(chunk, nothing, settings)
    computed = np.ones(rows.num_rows, dtype=bool)
    if chunk.known is not None:
        computed[chunk.known["row"].to_numpy()] = False
    kept, dropped = _without(rows, computed, "embed", "replica-died", message)
    rejects = pa.concat_tables([chunk.rejects, dropped])
    return Embedded.of(chunk.head, kept, rejects, _num_known(chunk))


def _num_known(chunk: Chunk) -> int:
    return 0 if chunk.known is None else chunk.known.num_rows


def _with_features(
    chunk: Chunk, computed: Mapping[str, npt.NDArray[Any]], settings: PartSettings
) -> tuple[pa.Table, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """All rows with what was computed for their tiles [n, ...] or was known, in their final type;
    which of them the model gave finite values, and which have only values that the type holds."""
    num_rows = chunk.rows.num_rows
    finite, fitting = np.ones(num_rows, dtype=bool), np.ones(num_rows, dtype=bool)
    new = np.ones(num_rows, dtype=bool)
    if chunk.known is not None:
        new[chunk.known["row"].to_numpy()] = False
    rows = chunk.rows
    for name, shape in settings.features.items():
        width = num_values(shape)
        values = np.empty((0, width), settings.embedding_dtype)
        if len(chunk.tiles):
            given = computed[name].reshape(len(chunk.tiles), -1)
            assert given.shape[1] == width, (name, computed[name].shape)
            values, is_finite, is_fitting = narrow(given, settings.embedding_dtype)
            finite[new] &= is_finite
            fitting[new] &= is_fitting
        if chunk.known is not None:
            values = _among(values, new, feature_values(chunk.known[name], width))
        rows = rows.append_column(name, vectors(values))
    schema = settings.layout.schema
    return rows.select(schema.names).cast(schema), finite, fitting


def _among(
    computed: npt.NDArray[Any], new: npt.NDArray[np.bool_], known: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    values = np.empty((len(new), known.shape[1]), computed.dtype)
    values[new], values[~new] = computed, known
    return values


def narrow(
    values: npt.NDArray[Any], embedding_dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """[n, D] in the final type; which rows are finite, and which have only values that it holds.

    Of values that come in float16 already, a NaN stands for what the model gave that was not
    finite, an infinity for what does not fit (`Encoder.encode`).
    """
    with np.errstate(over="ignore"):
        narrowed = values.astype(embedding_dtype, copy=False)
    # Row by row: a mask of all of them would be half as large as they are.
    fitting = np.array([bool(np.isfinite(row).all()) for row in narrowed], bool)
    finite = fitting.copy()
    for at in np.flatnonzero(~fitting):
        if values.dtype == np.float16:
            finite[at] = not np.isnan(values[at]).any()
        else:
            finite[at] = np.isfinite(values[at]).all()
    return narrowed, finite, fitting


def write_part(embedded: Embedded, settings: PartSettings) -> Part:
    """Writes an embedded chunk as an Arrow file of this run.

    A storage that fails for good is told in the part's `failure`: it ends the shard, not the job.
    """
    began = time.perf_counter()
    kept, rejects = embedded.rows, embedded.rejects
    head = embedded.head
    file = part_file(head)
    failure = None
    try:
        settings.storage.publish_bytes(join(settings.folder, file), embedded.file.data)
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
        num_bytes=len(embedded.file),
        failure=failure,
        crc32=zlib.crc32(embedded.file.data),
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


def read_part(part: Part, settings: PartSettings) -> tuple[pa.Table, pa.Table]:
    """The rows and the rejects of a part file.

    Raises:
        OSError: it cannot be read, or is not what was written.
    """
    table = from_ipc(settings.storage.read(join(settings.folder, part.file), part.crc32))
    rejects = from_ipc(table.schema.metadata[b"rejects"])
    return table.replace_schema_metadata(None), rejects


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
