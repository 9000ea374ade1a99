"""How fast is each stage alone, on one core?

python -m benchmarks.stages [--seconds N] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from PIL import Image
from ray.data.block import BlockAccessor

from benchmarks.dataset import NUM_PICTURES, laion_like, write_shard
from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from benchmarks.s3_server import s3_server
from pipeline.chunks import Chunk, TileSettings, tile_group
from pipeline.embedding import PartSettings, embed_chunk, write_part
from pipeline.ledger import CompleteShard
from pipeline.records import Head, Part, Seconds, Shard, ShardEnd, rejects_table, sample_schema
from pipeline.samples import GroupRow, ReadSettings, read_groups
from pipeline.stages import tile_stage
from pipeline.storage import Storage
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings, finalize_shard

SIDE = 448  # pixels
HIDDEN = 3200  # width of `cls` in the 6B
READ_PICTURES = 900  # about 100 MB
PARTS, ROWS = 12, 128  # chunks of a shard of 1 500 tiles, and their rows
MEGA = 1e6

# prototype, 2 noisy cores, 2026-11-22: (MB/s, pictures/s, tiles/s)
PROTOTYPE: dict[str, tuple[Cell, Cell, Cell]] = {
    "read, s3": ("95-160", None, None),
    "dynamic, exact": (None, 30, 246),
    "dynamic, fast": (None, 153, 1249),
    "center-crop, exact": (None, 87, 87),
    "center-crop, fast": (None, 254, 254),
    "hand-over of 8 tiles": (220, None, None),
    "hand-over of 64 tiles": (900, None, None),
    "hand-over of 256 tiles": ("1600-2900", None, None),
    "finalize": (120, None, None),  # Parquet without statistics, and nothing else
}


@dataclass(frozen=True)
class Figure:
    """What one pass over a stage's work took, seconds, and how much work that is."""

    stage: str
    passes: list[float]
    num_bytes: int = 0
    pictures: int = 0
    tiles: int = 0

    def row(self) -> tuple[Cell, ...]:
        seconds = statistics.median(self.passes)
        work = (self.num_bytes / MEGA, self.pictures, self.tiles)
        before = PROTOTYPE.get(self.stage, (None, None, None))
        spread = f"{min(self.passes):.3f}-{max(self.passes):.3f}"
        return (
            self.stage,
            *(float(f"{amount / seconds:.3g}") if amount else None for amount in work),
            *before,
            len(self.passes),
            spread,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure [default: 5]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    pictures = laion_like()
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        tar = write_shard(folder / "00000.tar", pictures, READ_PICTURES)
        small = write_shard(folder / "tiling.tar", pictures, NUM_PICTURES)
        figures = []
        # What serves a stage (S3 server, Ray) starts before this process takes to one core.
        with s3_server(folder / "s3") as server:
            url = server.upload(tar)
            with one_core():
                figures.append(reading("read, local", str(tar), {}, tar, options.seconds))
                figures.append(reading("read, s3", url, server.options, tar, options.seconds))
        with one_core():
            figures += tiling(small, options.seconds)
            figures += writing(folder / "output", options.seconds)
        ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=1 << 30)
        try:
            with one_core():
                figures += [hand_over(number, options.seconds) for number in (8, 64, 128, 256)]
        finally:
            ray.shutdown()
    columns = ("stage", "MB/s", "pictures/s", "tiles/s")
    prototype = tuple(f"prototype {column}" for column in columns[1:])
    table = Table(
        "Each stage alone, one core",
        (*columns, *prototype, "passes", "seconds a pass, min-max"),
        tuple(figure.row() for figure in figures),
    )
    notes = [
        "medians over passes; 1 MB = 10^6 bytes",
        "prototype: 2 noisy cores, 2026-11-22",
        f"S3 server: {server.name} on loopback, on the other cores",
        f"tiling: {NUM_PICTURES} JPEGs, {sum(map(len, pictures)) / len(pictures) / 1e3:.0f} kB "
        f"each, tiles of {SIDE} pixels; the task whole: header, decode, cut, metadata, SHA-256",
        f"writing: {PARTS} parts of {ROWS} rows, cls of width {HIDDEN} in float16; bytes are those "
        "of the part and the Parquet files; every part and the output are fsynced",
    ]
    print(write_result("stages", "cpu", about, [table], notes, options.results))


def timed(work: Callable[[], object], seconds: float) -> list[float]:
    """Passes of `work` for about `seconds`, at least three, after one that does not count."""
    work()
    passes: list[float] = []
    while len(passes) < 3 or sum(passes) < seconds:
        began = time.perf_counter()
        work()
        passes.append(time.perf_counter() - began)
    return passes


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one of its cores, with one thread of torch and of Arrow."""
    allowed = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def reading(stage: str, url: str, options: dict[str, str], tar: Path, seconds: float) -> Figure:
    settings = ReadSettings(Storage(options), ("jpg",), ("txt", "json:url"))

    def work() -> None:
        samples = sum(len(g.samples) for g in read_groups(Shard(url, "00000"), settings))
        assert samples == READ_PICTURES, samples

    return Figure(stage, timed(work, seconds), tar.stat().st_size, READ_PICTURES)


def tiling(tar: Path, seconds: float) -> list[Figure]:
    settings = ReadSettings(Storage(), ("jpg",), ("txt",))
    (group,) = read_groups(Shard(str(tar), "tiling"), settings)
    dumped = group.dump()
    figures = []
    for mode in ("dynamic", "center-crop"):
        for resize in ("exact", "fast"):
            how = Tiling(mode, SIDE, SIDE, resize=resize)
            how_to = TileSettings(how, ("txt",), deadline_seconds=60, chunk_tiles=ROWS)

            def work(settings: TileSettings = how_to) -> int:
                return sum(row["tiles"].shape[1] for row in tile_stage(dumped, settings))

            tiles = work()
            passes = timed(work, seconds)
            stage = f"{mode}, {resize}"
            figures.append(Figure(stage, passes, tiles * SIDE * SIDE * 3, NUM_PICTURES, tiles))
    return figures


def hand_over(num_tiles: int, seconds: float) -> Figure:
    """A chunk as Ray Data passes it on: row → block → object store → block → row."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (num_tiles, SIDE, SIDE, 3), dtype=np.uint8)
    chunk = replace(_chunk(num_tiles), tiles=tiles)

    def work() -> None:
        reference = ray.put(BlockAccessor.batch_to_block(chunk.dump()))
        block = BlockAccessor.for_block(ray.get(reference))
        arrived = Chunk.load(block.to_batch_format("numpy"))
        assert len(arrived.rows) == len(arrived.tiles) == num_tiles

    passes = timed(work, seconds)
    return Figure(f"hand-over of {num_tiles} tiles", passes, tiles.nbytes, 0, num_tiles)


def writing(output: Path, seconds: float) -> list[Figure]:
    """`write_part` and `finalize_shard` of one shard, timed apart."""
    settings = PartSettings(Storage(), str(output), "run", {"cls": HIDDEN}, "float16", ("txt",))
    finalize = FinalizeSettings(settings, fingerprint="0" * 64, target_part_bytes=512 << 20)
    rng = np.random.default_rng(0)

    def encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        return {"cls": rng.standard_normal((len(tiles), HIDDEN), dtype=np.float32)}

    chunk = _chunk(ROWS)
    embedded = []
    for number in range(PARTS):
        last = number == PARTS - 1
        end = ShardEnd(PARTS * ROWS, 0, None) if last else None
        head = replace(chunk.head, chunk=number, last_chunk=last, end=end, seconds=Seconds())
        embedded.append(embed_chunk(replace(chunk, head=head), encode, settings))
    parts: list[Part] = []
    apart: dict[str, list[float]] = {"write parts": [], "finalize": []}

    def work() -> None:
        began = time.perf_counter()
        parts[:] = [write_part(piece, settings) for piece in embedded]
        middle = time.perf_counter()
        head = parts[-1].head
        assert head.end is not None
        finalize_shard(CompleteShard(head.shard, head.url, head.end, tuple(parts)), finalize)
        apart["write parts"].append(middle - began)
        apart["finalize"].append(time.perf_counter() - middle)

    both = timed(work, seconds)
    written = (output / "embeddings" / f"{parts[0].head.shard}.parquet").stat().st_size
    tiles = PARTS * ROWS
    figures = [Figure(stage, passes[1:], written, tiles=tiles) for stage, passes in apart.items()]
    shutil.rmtree(output)
    return [*figures, Figure("write parts + finalize", both, written, tiles=tiles)]


def _chunk(num_rows: int) -> Chunk:
    """One tile of one pixel a row, with the metadata of real ones."""
    sink = io.BytesIO()
    Image.new("RGB", (640, 480)).save(sink, "JPEG")
    rows = [
        {"key": f"{n:09d}", "sample_index": n, "member": "jpg", "data": sink.getvalue(), "txt": "…"}
        for n in range(num_rows)
    ]
    samples = pa.Table.from_pylist(rows, sample_schema(("txt",)))
    group = GroupRow(Head("shard", "file", 0), samples, rejects_table([]))
    settings = TileSettings(Tiling("center-crop", 1, 1), ("txt",), 60, chunk_tiles=num_rows)
    (chunk,) = tile_group(group, settings)
    return chunk


if __name__ == "__main__":
    main()
