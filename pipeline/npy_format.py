"""Parts as one array a feature and a table of the other columns beside them.

autofaiss (through embedding-reader) and clip-retrieval's back end take them as they are: see
`pipeline.generations` for their names. A part without rows has arrays and no table, because
embedding-reader leaves arrays of no rows out before it pairs them with the tables.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib import format as npy

from pipeline.layout import Layout
from pipeline.parquet_format import TABLE_BYTES, ParquetPart, open_parquet, write_parquet
from pipeline.part_copies import OpenPart, PartError, Sink
from pipeline.vectors import feature_values, vectors


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What stands before the values of an array in C order; its length is a multiple of 64."""
    sink = io.BytesIO()
    kind = npy.dtype_to_descr(np.dtype(dtype))
    npy.write_array_header_1_0(sink, {"descr": kind, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def metadata_schema(layout: Layout) -> pa.Schema:
    return pa.schema([field for field in layout.schema if field.name not in layout.features])


def write_arrays(
    sinks: Sequence[Sink],
    tables: Iterator[pa.Table],
    layout: Layout,
    num_rows: int,
    fingerprint: str,
) -> int:
    """Writes a part whose number of rows is known; gives it as it was counted.

    Args:
        sinks: one for each feature, and one for the table where there are rows.
    """
    widths = {name: layout.schema.field(name).type.list_size for name in layout.features}
    arrays = dict(zip(layout.features, sinks, strict=False))
    for name, sink in arrays.items():
        sink.write(npy_header((num_rows, widths[name]), layout.embedding_dtype))
    schema = metadata_schema(layout)

    def metadata() -> Iterator[pa.Table]:
        for table in filter(len, tables):
            for name, sink in arrays.items():
                sink.write(feature_values(table[name], widths[name]).data.cast("B"))
            yield table.select(schema.names)

    if num_rows == 0:
        return sum(table.num_rows for table in metadata())
    return write_parquet(sinks[-1], metadata(), schema, (), fingerprint)


class NpyPart(OpenPart):
    """A batch is a row group of the table, and those rows of the arrays [n, D]."""

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[Any]], table: ParquetPart | None, layout: Layout
    ) -> None:
        self._arrays = arrays
        self._table = table
        self._names = layout.schema.names
        self.num_batches = 0 if table is None else table.num_batches
        self._starts = [0]
        for number in range(self.num_batches):
            rows = self._read(number, ["sample_index"]).num_rows
            self._starts.append(self._starts[-1] + rows)

    def _read(self, number: int, columns: Sequence[str]) -> pa.Table:
        assert self._table is not None
        return self._table.batch(number, columns)

    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        names = self._names if columns is None else list(columns)
        rows = self._read(number, [name for name in names if name not in self._arrays])
        start, end = self._starts[number : number + 2]
        for name in names:
            if name in self._arrays:
                rows = rows.append_column(name, vectors(self._arrays[name][start:end]))
        return rows.select(names)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Some `TABLE_BYTES` at a time, as of Parquet."""
        for rows in super().tables(columns):
            at_once = max(1, TABLE_BYTES * rows.num_rows // max(1, rows.nbytes))
            for start in range(0, rows.num_rows, at_once):
                yield rows.slice(start, at_once)


@contextmanager
def open_arrays(files: Sequence[Path], layout: Layout, rows: int) -> Iterator[NpyPart]:
    """Raises PartError: not arrays and Parquet, or not of the layout's columns."""
    num_files = len(layout.features) + (rows > 0)
    if len(files) != num_files:
        raise PartError(f"{len(files)} objects, where {num_files} are due")
    arrays = {}
    for (name, field), file in zip(
        ((name, layout.schema.field(name)) for name in layout.features), files, strict=False
    ):
        shape, kind = (rows, field.type.list_size), np.dtype(layout.embedding_dtype)
        header = npy_header(shape, layout.embedding_dtype)
        due = len(header) + rows * shape[1] * kind.itemsize
        with file.open("rb") as source:
            found = source.read(len(header))
        if found != header or file.stat().st_size != due:
            raise PartError(f"the array of {name} is not {kind} {list(shape)}")
        arrays[name] = (
            np.memmap(file, kind, "r", len(header), shape) if rows else np.empty(shape, kind)
        )
    with ExitStack() as stack:
        table = None
        if rows:
            table = stack.enter_context(open_parquet(files[-1], metadata_schema(layout), rows))
        yield NpyPart(arrays, table, layout)
