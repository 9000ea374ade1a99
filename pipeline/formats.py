"""The formats of OUTPUT behind one interface: a part is written from tables, and read as tables.

To read what is committed, whatever its format:

    layout = layout_of(read_dataset(output, storage))
    for part in commit.parts:
        for table in part_tables(part, output, layout, storage):
            ...  # rows in order, of layout.schema; some 8 MiB, or one picture where that is more
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from pipeline.commits import PartFile
from pipeline.layout import Layout
from pipeline.npy_format import open_arrays, write_arrays
from pipeline.parquet_format import open_parquet, write_parquet
from pipeline.part_copies import OpenPart, Sink, local_copies
from pipeline.storage import Storage
from pipeline.webdataset_format import open_tar, write_tar


def part_tables(
    part: PartFile,
    output: str,
    layout: Layout,
    storage: Storage,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """The rows of a committed part in order, batch by batch, all columns or those.

    The part is copied to this machine first, and compared with its commit.

    Raises:
        PartError: it is missing, or not what was committed.
        OSError: the storage failed.
    """
    with open_part(part, output, layout, storage) as opened:
        yield from opened.tables(columns)


@contextmanager
def open_part(
    part: PartFile,
    output: str,
    layout: Layout,
    storage: Storage,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[OpenPart]:
    """A committed part, copied to this machine and compared with its commit: any of its batches, as
    often as they are wanted.

    Args:
        sizes: in bytes, by path below OUTPUT, where it has been listed; None: they are looked up.

    Raises:
        PartError: it is missing, or not what was committed.
        OSError: the storage failed.
    """
    with (
        local_copies(part, output, storage, sizes) as copies,
        open_local(list(copies.values()), layout, part.rows) as opened,
    ):
        yield opened


@contextmanager
def open_local(files: Sequence[Path], layout: Layout, rows: int) -> Iterator[OpenPart]:
    """The objects of a part, which are here. Raises PartError."""
    if layout.format == "npy":
        with open_arrays(files, layout, rows) as arrays:
            yield arrays
    elif layout.format == "webdataset":
        with open_tar(files[0], layout, rows) as tar:
            yield tar
    else:
        with open_parquet(files[0], layout.schema, rows) as parquet:
            yield parquet


def write_objects(
    sinks: Sequence[Sink],
    tables: Iterator[pa.Table],
    layout: Layout,
    num_rows: int,
    fingerprint: str,
) -> int:
    """Writes a part into one sink for each of its objects; gives the rows that it got."""
    if layout.format == "npy":
        return write_arrays(sinks, tables, layout, num_rows, fingerprint)
    (sink,) = sinks
    if layout.format == "webdataset":
        return write_tar(sink, tables, layout)
    return write_parquet(sink, tables, layout.schema, list(layout.features), fingerprint)
