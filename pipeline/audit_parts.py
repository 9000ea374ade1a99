"""Reads the published parts of a shard again: their bytes, columns and values.

A problem is one line without the name of the part. Memory: one row group, and a few dozen bytes for
each row and sample of the shard.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Dataset, PartFile
from pipeline.embedding import feature_values
from pipeline.local_files import BLOCK_BYTES
from pipeline.records import REJECT_SCHEMA, TILE_FIELDS, embedding_schema
from pipeline.storage import Storage, join

STAGES = frozenset({"read", "decode", "tile", "embed", "write"})
SHOWN = 5  # numbers that one line names

Integers = npt.NDArray[np.integer[Any]]


class PartError(Exception):
    """A part that cannot be read as what it should be; the message is the problem."""


@dataclass(frozen=True)
class Rejected:
    """A row of the rejects."""

    key: str
    stage: str
    error: str


@dataclass
class Seen:
    """What the rows of a shard say, gathered part by part and row group by row group.

    `index`, `tile` and `count` hold sample_index, tile_index and tile_count of every row; `keys`
    and `digests` are those of each embedded sample, by its index.
    """

    index: list[Integers] = field(default_factory=list)
    tile: list[Integers] = field(default_factory=list)
    count: list[Integers] = field(default_factory=list)
    keys: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    rejects: dict[int, Rejected] = field(default_factory=dict)


@contextmanager
def fetch_part(part: PartFile, output: str, size: int, storage: Storage) -> Iterator[Path]:
    """A local copy of a published part, for as long as the `with` lasts.

    Raises:
        PartError: it is not the bytes that were committed.
    """
    if size != part.bytes:
        raise PartError(f"{size} bytes, the commit says {part.bytes}")
    with tempfile.NamedTemporaryFile(prefix="tessera-verify-") as copy:
        copy_part(part, output, storage, copy)
        yield Path(copy.name)


def copy_part(part: PartFile, output: str, storage: Storage, sink: IO[bytes]) -> None:
    """Copies a published part, block by block.

    Raises:
        PartError: it is not the bytes that were committed.
    """
    digest = hashlib.sha256()
    for start in range(0, part.bytes, BLOCK_BYTES):
        end = min(start + BLOCK_BYTES, part.bytes)
        block = storage.read_range(join(output, part.path), start, end)
        digest.update(block)
        sink.write(block)
    sink.flush()
    if digest.hexdigest() != part.sha256:
        raise PartError("its bytes are not those that were committed (sha256 differs)")


def row_groups(local: Path, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The rows of a part, a row group at a time.

    Raises:
        PartError: not Parquet, other columns, another number of rows, or a null where none may be.
    """
    may_be_null = set(schema.names) - {f.name for f in [*TILE_FIELDS, *REJECT_SCHEMA]}
    may_be_null -= {f.name for f in schema if pa.types.is_fixed_size_list(f.type)}
    try:
        with pq.ParquetFile(local) as file:
            if not file.schema_arrow.equals(schema, check_metadata=False):
                raise PartError(_schema_difference(file.schema_arrow, schema))
            if file.metadata.num_rows != rows:
                raise PartError(f"{file.metadata.num_rows} rows, the commit says {rows}")
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, use_threads=False)
                for name in schema.names:
                    column = table[name]
                    if name not in may_be_null and _null_count(column):
                        raise PartError(f"column {name} holds nulls")
                yield table
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise PartError(f"cannot be read as Parquet: {reason}") from error


def _null_count(column: pa.ChunkedArray) -> int:
    nested = pa.types.is_fixed_size_list(column.type)
    return int(column.null_count + (column.combine_chunks().flatten().null_count if nested else 0))


def _schema_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    if found.names != wanted.names:
        return f"columns {', '.join(found.names)}; dataset.json asks {', '.join(wanted.names)}"
    names = [n for n in wanted.names if found.field(n) != wanted.field(n)]
    return "; ".join(
        f"column {n} is {found.field(n).type}, dataset.json asks {wanted.field(n).type}"
        for n in names
    )


def row_problems(local: Path, part: PartFile, dataset: Dataset, seen: Seen) -> list[str]:
    """Reads a part of the embeddings: adds its rows to `seen`, tells what is wrong within them.

    Raises:
        PartError: see `row_groups`.
    """
    settings = dataset.settings
    carry = tuple(settings["carry"])
    schema = embedding_schema(dataset.features, settings["embedding_dtype"], carry)
    bad: dict[str, set[int]] = defaultdict(set)  # what is wrong -> with which samples
    for table in row_groups(local, schema, part.rows):
        index = table["sample_index"].to_numpy()
        seen.index.append(index)
        seen.tile.append(table["tile_index"].to_numpy())
        seen.count.append(table["tile_count"].to_numpy())
        for name in ("tile_box", *dataset.features):
            values = feature_values(table[name], schema.field(name).type.list_size)
            finite = np.isfinite(values).all(axis=1)
            bad[f"a value of {name} is not finite"].update(index[~finite].tolist())
        starts = run_starts(index)
        # for each row, the first of its run
        of_run = np.repeat(starts, np.diff(starts, append=len(index)))
        for name in ("key", "image_sha256", "width", "height"):
            values = table[name].to_numpy()
            same = values == values[of_run]
            bad[f"rows of one picture differ in {name}"].update(index[~same].tolist())
        keys = table["key"].take(starts).to_pylist()
        digests = table["image_sha256"].take(starts).to_pylist()
        for sample, key, digest in zip(index[starts].tolist(), keys, digests, strict=True):
            if seen.keys.setdefault(sample, key) != key:
                bad["rows of one picture differ in key"].add(sample)
            if seen.digests.setdefault(sample, digest) != digest:
                bad["rows of one picture differ in image_sha256"].add(sample)
    return [f"{what}: {named(samples)}" for what, samples in bad.items() if samples]


def reject_problems(local: Path, part: PartFile, seen: Seen) -> list[str]:
    """Reads the rejects: adds them to `seen`, tells what is wrong within them.

    Raises:
        PartError: see `row_groups`.
    """
    problems = []
    last = -1
    for table in row_groups(local, REJECT_SCHEMA, part.rows):
        for row in table.to_pylist():
            index = row["sample_index"]
            if index <= last:
                problems.append(f"sample {index} after sample {last}")
            if row["stage"] not in STAGES or not row["error"]:
                problems.append(f"sample {index}: stage {row['stage']!r}, error {row['error']!r}")
            last = index
            seen.rejects[index] = Rejected(row["key"], row["stage"], row["error"])
    return problems


def run_starts(index: Integers) -> Integers:
    """Where in [n] a run of equal values begins."""
    starts: Integers = np.flatnonzero(np.append(True, index[1:] != index[:-1])[: len(index)])
    return starts


def named(samples: Iterable[int]) -> str:
    """`sample 3`, or `samples 1, 2, 3, 4, 5 and 7 more`."""
    numbers = sorted(samples)
    text = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"sample{'s' if len(numbers) > 1 else ''} {text}{more}"
