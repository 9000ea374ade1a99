"""Parts as Parquet: how they are written and read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.part_copies import OpenPart, PartError, Sink
from pipeline.records import TILE_FIELDS

TABLE_BYTES = 8 << 20


def write_parquet(
    sink: Sink,
    tables: Iterator[pa.Table],
    schema: pa.Schema,
    features: Sequence[str],
    fingerprint: str,
) -> int:
    """A row group a table; gives the number of rows."""
    leaves = {f"{name}.list.element" for name in features}
    small = [field.name for field in [*TILE_FIELDS, *schema] if field.name not in features]
    columns = [leaf for name in dict.fromkeys(small) for leaf in _leaves(schema, name)]
    metadata = {"tessera.fingerprint": fingerprint}
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


class ParquetPart(OpenPart):
    """A batch is a row group."""

    def __init__(self, file: pq.ParquetFile, total_bytes: int) -> None:
        self._file = file
        self._rows_at_once = max(1, TABLE_BYTES * file.metadata.num_rows // total_bytes)
        self.num_batches = file.num_row_groups

    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        with parquet_explained():
            names = None if columns is None else list(columns)
            return self._file.read_row_group(number, columns=names, use_threads=False)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Some `TABLE_BYTES` at a time: a row group at once takes five times its size while it is
        decoded, and memory that is new to the process costs more than the decoding."""
        names = None if columns is None else list(columns)
        with parquet_explained():
            for rows in self._file.iter_batches(
                self._rows_at_once, columns=names, use_threads=False
            ):
                yield pa.Table.from_batches([rows])


@contextmanager
def open_parquet(local: Path, schema: pa.Schema, rows: int) -> Iterator[ParquetPart]:
    """Raises PartError: not Parquet, other columns, or another number of rows."""
    with parquet_explained():
        file = pq.ParquetFile(local)
    with file:
        if not file.schema_arrow.equals(schema, check_metadata=False):
            raise PartError(_schema_difference(file.schema_arrow, schema))
        if file.metadata.num_rows != rows:
            raise PartError(f"{file.metadata.num_rows} rows, the commit says {rows}")
        yield ParquetPart(file, local.stat().st_size)


@contextmanager
def parquet_explained() -> Iterator[None]:
    """Turns what Arrow raises for a file that is none into a PartError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise PartError(f"cannot be read as Parquet: {reason}") from error


def _schema_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    if found.names != wanted.names:
        return f"columns {', '.join(found.names)}; dataset.json asks {', '.join(wanted.names)}"
    names = [n for n in wanted.names if found.field(n) != wanted.field(n)]
    return "; ".join(
        f"column {n} is {found.field(n).type}, dataset.json asks {wanted.field(n).type}"
        for n in names
    )
