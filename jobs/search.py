"""`tessera search INDEX`: the pictures of an index that are nearest to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.html_elements import cut
from jobs.query import QueryEncoder, read_picture
from model.errors import UserError
from pipeline.printable import printable
from pipeline.storage import Storage
from pipeline.vector_index import Neighbor, VectorIndex

COLUMNS = ("distance", "key", "shard", "caption")


@dataclass(frozen=True)
class Query:
    """A picture file, or the key of a picture of the index (in `shard`, where several have it).

    Raises UserError: neither, or both.
    """

    image: Path | None = None
    key: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        if (self.image is None) == (self.key is None):
            raise UserError("search: expected one of --image FILE, --key KEY")
        if self.shard is not None and self.key is None:
            raise UserError("search: --shard says in which shard --key is; it needs one")


def nearest_to_vector(
    index: VectorIndex, vector: npt.NDArray[np.float32], count: int
) -> list[Neighbor]:
    """The nearest pictures to a vector [D], the nearest first."""
    return index.search(vector[None], count)[0]


@dataclass(frozen=True)
class Around:
    """A picture of the index, and the others nearest to it."""

    asked: Neighbor
    neighbors: Sequence[Neighbor]


def nearest_to_key(
    index: VectorIndex, key: str, shard: str | None, count: int, sample_index: int | None = None
) -> Around:
    """What is nearest to a picture of the index, itself left out.

    Raises:
        UserError: no picture has the key, or several have: pictures of several shards, or of one.
    """
    asked, vector = index.picture(key, shard, sample_index)
    found = nearest_to_vector(index, vector, count + 1)
    place = (asked.shard, asked.sample_index)
    others = [n for n in found if (n.shard, n.sample_index) != place]
    return Around(asked, others[:count])


def distance(neighbor: Neighbor) -> float:
    """1 - cosine: 0 for the same direction, 2 for the opposite one."""
    return max(0.0, 1.0 - neighbor.similarity)  # rounding takes it below


def to_json(neighbor: Neighbor) -> dict[str, Any]:
    return {
        "key": neighbor.key,
        "shard": neighbor.shard,
        "sample_index": neighbor.sample_index,
        "caption": neighbor.caption,
        "distance": round(distance(neighbor), 6),
    }


def search(
    index: str,
    query: Query,
    count: int,
    model: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Neighbor]:
    """The nearest pictures of an index to a picture file, or to one of its own.

    Raises:
        UserError: INDEX, the picture, or the model that made it cannot be used.
    """
    storage = Storage(storage_options or {})
    if query.image is None:
        assert query.key is not None
        opened = VectorIndex.open(index, storage)
        return list(nearest_to_key(opened, query.key, query.shard, count).neighbors)
    data = read_picture(query.image)
    opened = VectorIndex.open(index, storage)
    encoder = QueryEncoder(opened.record, storage, model)
    try:
        vector = encoder.vector(data, str(query.image))
    finally:
        encoder.close()
    return nearest_to_vector(opened, vector, count)


def show_neighbors(neighbors: Sequence[Neighbor]) -> None:
    """A line for each, in columns; the caption comes last, as it may be long."""
    rows = [COLUMNS] + [
        (f"{distance(n):.4f}", n.key, n.shard, cut(n.caption or "")) for n in neighbors
    ]
    shown = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
