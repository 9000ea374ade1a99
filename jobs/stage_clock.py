"""A tiling task or a replica of a local run, as a process that works when it is told to.

    python -m jobs.stage_clock tile|encode < orders

The first line is its job as JSON (`TileJob`, `EncodeJob`); it answers one line when it is ready.
Each further line is a number of seconds: it works for so long, goes on to the end of its chunk, and
answers with what it did. It ends with its input. Several together share the cores as they do in a
local run: tiling is as nice as there, a replica has its number of threads.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.feature_shapes import feature_shape
from pipeline.chunks import Chunk, TileSettings
from pipeline.embedding import PartSettings, embed_chunk
from pipeline.records import Row, from_ipc
from pipeline.samples import GroupRow
from pipeline.stages import tile_stage
from pipeline.storage import Storage
from pipeline.tiling import Tiling

WARM_UP_CHUNKS = 2


@dataclass(frozen=True)
class TileJob:
    """`samples`: an Arrow file of the groups' rows (`jobs.trial.group_of`), a group a file."""

    samples: tuple[str, ...]
    tiling: dict[str, Any]
    carry: tuple[str, ...]
    deadline_seconds: float
    chunk_tiles: int

    def settings(self) -> TileSettings:
        tiling = Tiling(**self.tiling)
        return TileSettings(tiling, tuple(self.carry), self.deadline_seconds, self.chunk_tiles)


@dataclass(frozen=True)
class EncodeJob:
    """How a replica loads and computes; the fields are those of `ReplicaSettings`."""

    model: str
    revision: str | None
    dtype: str
    attention: str
    layer: int
    features: tuple[str, ...]
    embedding_dtype: str
    batch_tiles: int | None
    threads: int
    chunk_tiles: int


@dataclass(frozen=True)
class Ready:
    """Seconds from the start of the process to here."""

    seconds: float
    detail: str


@dataclass(frozen=True)
class Done:
    tiles: int
    seconds: float
    cpu_seconds: float


class NoDeaths:
    """`Attempts` of a process that nobody restarts."""

    def begin(self, name: str) -> int:
        return 0

    def finish(self, name: str) -> None:
        pass


def tiling(job: TileJob) -> Iterator[int]:
    """Tiles of one chunk after the other, for ever."""
    from jobs.trial import NAME
    from pipeline.records import Head, rejects_table

    settings = job.settings()
    groups: list[Row] = []
    for number, file in enumerate(job.samples):
        table = from_ipc(Path(file).read_bytes())
        groups.append(GroupRow(Head(NAME, NAME, number), table, rejects_table([])).dump())
    for group in itertools.cycle(groups):
        for row in tile_stage(group, settings, NoDeaths()):
            yield len(row["tiles"][0])


def encoding(job: EncodeJob) -> tuple[str, Iterator[int]]:
    """The replica's choices, and tiles of one chunk after the other, for ever."""
    import torch

    from model.checkpoint import open_checkpoint
    from model.encoder import Encoder

    torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(job.model, job.revision)
    encoder = Encoder.load(
        checkpoint,
        dtype=job.dtype,  # type: ignore[arg-type]
        device="cpu",
        layer=job.layer,
        features=tuple(job.features),
        embedding_dtype=job.embedding_dtype,  # type: ignore[arg-type]
        attention=job.attention,
        batch_tiles=job.batch_tiles,
    )
    side = checkpoint.preprocessor.crop
    features = {name: feature_shape(name, checkpoint.config, side) for name in job.features}
    parts = PartSettings(Storage(), "", "", features, job.embedding_dtype, ())
    chunk = _chunk(job.chunk_tiles, side)

    def work() -> Iterator[int]:
        while True:
            embed_chunk(chunk, encoder.encode, parts).dump()
            yield job.chunk_tiles

    return f"attention {encoder.attention.name}, batches of {encoder.batch_tiles}", work()


def _chunk(num_tiles: int, side: int) -> Chunk:
    """Random pixels with the rows of one picture."""
    from pipeline.records import Head, rejects_table, tile_schema

    row = {
        "key": "k",
        "sample_index": 0,
        "tile_count": num_tiles,
        "is_thumbnail": False,
        "tile_box": [0.0, 0.0, 1.0, 1.0],
        "width": side,
        "height": side,
        "image_sha256": bytes(32),
    }
    import pyarrow as pa

    rows = [{**row, "tile_index": index} for index in range(num_tiles)]
    tiles = np.random.default_rng(0).integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8)
    table = pa.Table.from_pylist(rows, tile_schema(()))
    return Chunk(Head("s", "s", 0), table, rejects_table([]), tiles)


def obey(work: Iterator[int], lines: Iterator[str], answer: Callable[[Done], None]) -> None:
    """Works for each line's seconds."""
    for line in lines:
        wanted, tiles = float(line), 0
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < wanted:
            tiles += next(work)
        answer(Done(tiles, time.perf_counter() - began, time.process_time() - cpu))


def _say(record: Ready | Done) -> None:
    print(json.dumps(asdict(record)), flush=True)


def _age() -> float:
    """Seconds since this process started (Linux); elsewhere since this module was loaded."""
    try:
        started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - started / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - LOADED


LOADED = time.monotonic()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if sys.argv[1] == "tile":
        detail, work = "", tiling(TileJob(**job))
    else:
        detail, work = encoding(EncodeJob(**job))
    for _ in range(WARM_UP_CHUNKS):
        next(work)
    _say(Ready(_age(), detail))
    obey(work, sys.stdin, _say)


if __name__ == "__main__":
    main()
