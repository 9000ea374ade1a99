"""The dataflow with stages that do no work: what is left is Ray's and the driver's bookkeeping.

Part files, output objects and commits are real; the reader makes up its samples, the tiles are
tiny, and the replica has no model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.actor import ActorHandle

from pipeline.chunks import Chunk, TileSettings
from pipeline.embedding import embed_chunk
from pipeline.records import Head, Row, ShardEnd, rejects_table, sample_schema, tile_schema
from pipeline.replica import ReplicaSettings
from pipeline.samples import GroupRow, ReadSettings

WIDTH = 8
SIDE = 2
GROUPS_VARIABLE = "TESSERA_BENCHMARK_GROUPS"  # groups, hence chunks, of each made-up shard


def quick_read(row: Row, settings: ReadSettings) -> Iterator[Row]:
    """Groups of one made-up sample; nothing is read."""
    url, name = str(row["url"][0]), str(row["name"][0])
    groups = int(os.environ.get(GROUPS_VARIABLE, "1"))
    for number in range(groups):
        sample = {"key": f"{name}-{number}", "sample_index": number, "member": "a.png", "data": b""}
        end = ShardEnd(groups, 0, None) if number == groups - 1 else None
        table = pa.Table.from_pylist([sample], sample_schema(()))
        yield GroupRow(Head(name, url, number, end=end), table, rejects_table([])).dump()


def quick_tile(row: Row, settings: TileSettings) -> Iterator[Row]:
    """One group → one chunk of one tiny tile."""
    group = GroupRow.load(row)
    (sample,) = group.samples.to_pylist()
    tile = {
        "key": sample["key"],
        "sample_index": sample["sample_index"],
        "tile_index": 0,
        "tile_count": 1,
        "is_thumbnail": False,
        "tile_box": (0.0, 0.0, 2.0, 2.0),
        "width": SIDE,
        "height": SIDE,
        "image_sha256": bytes(32),
    }
    head = Head(**{**vars(group.head), "last_chunk": True})
    rows = pa.Table.from_pylist([tile], tile_schema(()))
    tiles = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    yield Chunk(head, rows, group.rejects, tiles).dump()


class StubReplica:
    """Embeds by a constant, and writes down that it was made."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        self._parts = settings.parts
        made = Path(settings.model) / f"{os.getpid()}-{time.monotonic_ns()}"
        made.touch(exist_ok=False)

    def __call__(self, row: Row) -> Row:
        return embed_chunk(Chunk.load(row), _encode, self._parts).dump()


def _encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    return {"cls": np.ones((len(tiles), WIDTH), np.float32)}
