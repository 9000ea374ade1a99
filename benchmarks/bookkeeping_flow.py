"""The dataflow with stages that do no work: what is left is Ray's and the driver's bookkeeping.

python -m benchmarks.bookkeeping_flow [--sizes 1000,10000] [--groups 1] [--results FOLDER]

Part files, output objects and commits are real; the reader makes up its samples, the tiles are
tiny, and the replica has no model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from jobs.cluster import connect
from pipeline import dataflow
from pipeline.chunks import Chunk, TileSettings
from pipeline.dataflow import FlowSettings, Tally
from pipeline.embedding import PartSettings, embed_chunk
from pipeline.records import Head, Row, Shard, ShardEnd, rejects_table, sample_schema, tile_schema
from pipeline.replica import ReplicaSettings
from pipeline.samples import GroupRow, ReadSettings
from pipeline.stages import Attempts
from pipeline.storage import Storage
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings

WIDTH = 8
SIDE = 2
GROUPS_VARIABLE = "TESSERA_BENCHMARK_GROUPS"  # groups, hence chunks, of each made-up shard


def quick_read(row: Row, settings: ReadSettings, output: FinalizeSettings) -> Iterator[Row]:
    """Groups of one made-up sample; nothing is read."""
    url, name = str(row["url"][0]), str(row["name"][0])
    groups = int(os.environ.get(GROUPS_VARIABLE, "1"))
    for number in range(groups):
        sample = {"key": f"{name}-{number}", "sample_index": number, "member": "a.png", "data": b""}
        end = ShardEnd(groups, 0, None) if number == groups - 1 else None
        table = pa.Table.from_pylist([sample], sample_schema(()))
        yield GroupRow(Head(name, url, number, end=end), table, rejects_table([])).dump()


def quick_tile(row: Row, settings: TileSettings, attempts: Attempts) -> Iterator[Row]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="What a shard costs the driver, and keeps of it.")
    parser.add_argument("--sizes", default="1000,10000", help="numbers of shards")
    parser.add_argument("--groups", type=int, default=1, help="chunks of a shard")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--one", type=int, help="run this size here and print its samples")
    options = parser.parse_args()
    os.environ[GROUPS_VARIABLE] = str(options.groups)
    if options.one:
        print(json.dumps(run_flow(options.one)))
        return
    about = machine()
    rows: list[tuple[Cell, ...]] = []
    curve: list[tuple[Cell, ...]] = []
    for size in map(int, options.sizes.split(",")):
        command = [sys.executable, "-m", "benchmarks.bookkeeping_flow", "--one", str(size)]
        command += ["--groups", str(options.groups)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        samples = found["samples"]
        rows.append(
            (
                size,
                options.groups,
                found["seconds"],
                round(1000 * found["seconds"] / size, 1),
                found["replicas"],
                samples[0][2],
                samples[len(samples) // 2][2],
                samples[-1][2],
            )
        )
        curve += [(size, *sample) for sample in samples]
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ("shards", "chunks a shard", "seconds", "ms a shard", "models loaded")
    rss = ("driver's RSS at 1 %, MiB", "at half", "at the end")
    tables = [
        Table("The flow without work", columns + rss, tuple(rows)),
        Table("On the way", ("shards", "committed", "seconds", "RSS, MiB"), tuple(curve)),
    ]
    notes = [
        "the reader makes samples up, the replica has no model; part files, output and commits are "
        "real, on the local disk",
        "seconds from the first shard that was committed to the last, Ray's start left out",
    ]
    print(write_result("bookkeeping-flow", "cpu", about, tables, notes, options.results))


def run_flow(size: int) -> dict[str, object]:
    """Commits `size` made-up shards on a local cluster; samples at 1 % and every tenth of them."""
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        made = folder / "made"
        made.mkdir()
        dataflow.read_stage, dataflow.tile_stage = quick_read, quick_tile
        dataflow.Replica = StubReplica  # type: ignore[misc,assignment]
        settings = flow_settings_of_stubs(folder, made)
        shards = [Shard(f"in/{n:06d}.tar", f"{n:06d}") for n in range(size)]
        samples: list[tuple[int, float, float]] = []
        marks = [size // 100, *(size * tenth // 10 for tenth in range(1, 11))]
        began = 0.0
        first = 0

        def tick(tally: Tally) -> None:
            nonlocal began, first
            if not began and tally.committed:
                began, first = time.monotonic(), tally.committed
            if began and tally.committed >= marks[0]:
                marks[:] = [mark for mark in marks if mark > tally.committed] or [size + 1]
                seconds = round(time.monotonic() - began, 1)
                rss = round(psutil.Process().memory_info().rss / 2**20, 1)
                samples.append((tally.committed, seconds, rss))
                print(samples[-1], file=sys.stderr, flush=True)

        connect(local=True)
        try:
            tally = dataflow.run_shards(shards, settings, tick, threading.Event())
        finally:
            ray.shutdown()
        assert tally.committed == size, tally.failures[:3]
        seconds = (time.monotonic() - began) * size / (size - first)
        return {
            "seconds": round(seconds, 1),
            "replicas": len(list(made.iterdir())),
            "samples": samples,
        }


def flow_settings_of_stubs(folder: Path, made: Path) -> FlowSettings:
    storage = Storage()
    parts = PartSettings(storage, str(folder / "out"), "run", {"cls": WIDTH}, "float16", ())
    return FlowSettings(
        read=ReadSettings(storage, ("png",)),
        tile=TileSettings(Tiling("center-crop", SIDE, SIDE), (), 60.0, 1),
        replica=ReplicaSettings(
            model=str(made),
            revision=None,
            weights_digest="",
            device="cpu",
            dtype="float32",
            attention="auto",
            layer=-1,
            batch_tiles=1,
            parts=parts,
        ),
        finalize=FinalizeSettings(parts, "f" * 64, 1 << 29),
        replicas=(1, 1),
        num_io_tasks=2,
        num_tile_tasks=2,
        max_reject_rate=1.0,
        buffer_bytes=64 << 20,
    )


if __name__ == "__main__":
    main()
