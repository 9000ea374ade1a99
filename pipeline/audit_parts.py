"""Reads the published parts of a shard again: their bytes, columns and values.

A problem is one line without the name of the part. Memory: one batch, and a few dozen bytes for
each row and sample of the shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.layout import Layout
from pipeline.part_copies import OpenPart, PartError
from pipeline.records import REJECT_SCHEMA, TILE_FIELDS
from pipeline.vectors import feature_values

STAGES = frozenset({"read", "decode", "tile", "embed", "write"})
SHOWN = 5  # numbers that one line names

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Rejected:
    """A row of the rejects."""

    key: str
    stage: str
    error: str


@dataclass
class Seen:
    """What the rows of a shard say, gathered part by part and batch by batch.

    `index`, `tile` and `count` hold sample_index, tile_index and tile_count of every row; `keys`
    and `digests` are those of each embedded sample, by its index.
    """

    index: list[Integers] = field(default_factory=list)
    tile: list[Integers] = field(default_factory=list)
    count: list[Integers] = field(default_factory=list)
    keys: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    rejects: dict[int, Rejected] = field(default_factory=dict)


def checked_tables(opened: OpenPart, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of a part, batch by batch.

    Raises:
        PartError: they cannot be read, or hold a null where none may be.
    """
    may_be_null = set(schema.names) - {f.name for f in [*TILE_FIELDS, *REJECT_SCHEMA]}
    may_be_null -= {f.name for f in schema if pa.types.is_fixed_size_list(f.type)}
    for table in opened.tables():
        for name in schema.names:
            if name not in may_be_null and _null_count(table[name]):
                raise PartError(f"column {name} holds nulls")
        yield table


def _null_count(column: pa.ChunkedArray) -> int:
    nested = pa.types.is_fixed_size_list(column.type)
    return int(column.null_count + (column.combine_chunks().flatten().null_count if nested else 0))


def row_problems(opened: OpenPart, layout: Layout, seen: Seen) -> list[str]:
    """Reads a part of the embeddings: adds its rows to `seen`, tells what is wrong within them.

    Raises:
        PartError: see `checked_tables`.
    """
    schema = layout.schema
    bad: dict[str, set[int]] = defaultdict(set)  # what is wrong -> with which samples
    for table in checked_tables(opened, schema):
        index = table["sample_index"].to_numpy()
        seen.index.append(index)
        seen.tile.append(table["tile_index"].to_numpy())
        seen.count.append(table["tile_count"].to_numpy())
        for name in ("tile_box", *layout.features):
            values = feature_values(table[name], schema.field(name).type.list_size)
            # Row by row: a mask of all of them would be half as large as they are.
            finite = np.array([bool(np.isfinite(row).all()) for row in values])
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


def reject_problems(opened: OpenPart, seen: Seen) -> list[str]:
    """Reads the rejects: adds them to `seen`, tells what is wrong within them.

    Raises:
        PartError: see `checked_tables`.
    """
    problems = []
    last = -1
    for table in checked_tables(opened, REJECT_SCHEMA):
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
