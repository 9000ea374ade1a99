"""How fast are tokens written on one core, and in how much memory?

python -m benchmarks.tokens [--tiles N] [--folder FOLDER] [--results FOLDER]

Tokens of the 6B's shape, 1025 x 3200 in float16, 6.56 MB a tile, in chunks as a GPU and a CPU have
them: what a replica does with what its encoder gave, the writing task, and the finalize task, each
alone on one core. Then the same as cls in tars, arrays and Parquet.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from benchmarks.stages import one_core
from pipeline.chunks import Chunk, chunk_tiles
from pipeline.commits import Format
from pipeline.embedding import Embedded, PartSettings, embed_chunk, write_part
from pipeline.ledger import CompleteShard
from pipeline.records import Head, Part, Shape, ShardEnd, num_values, rejects_table, tile_schema
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings, finalize_shard

MEGA = 1e6
TOKENS: Shape = (1025, 3200)
PICTURE_TILES = 5
CASES: Sequence[tuple[str, Format, dict[str, Shape]]] = (
    ("tokens", "webdataset", {"tokens": TOKENS}),
    ("tokens-2x2", "webdataset", {"tokens-2x2": (256, 12_800)}),
    ("cls", "webdataset", {"cls": 3200}),
    ("cls", "npy", {"cls": 3200}),
    ("cls", "parquet", {"cls": 3200}),
)


def chunk_of(tiles: int, number: int, last: bool) -> Chunk:
    """Metadata of pictures of PICTURE_TILES tiles; of the pixels only the number matters."""
    rows = [
        {
            "key": f"{number:04d}{at // PICTURE_TILES:04d}",
            "sample_index": number * tiles + at // PICTURE_TILES,
            "tile_index": at % PICTURE_TILES,
            "tile_count": min(PICTURE_TILES, tiles - at // PICTURE_TILES * PICTURE_TILES),
            "is_thumbnail": False,
            "tile_box": [0.0, 0.0, 448.0, 448.0],
            "width": 448,
            "height": 448,
            "image_sha256": bytes(32),
            "txt": "a caption of some thirty letters",
        }
        for at in range(tiles)
    ]
    end = ShardEnd(10**6, 0, None) if last else None
    table = pa.Table.from_pylist(rows, tile_schema(("txt",)))
    head = Head("s", "s", 0, number, last, end)
    return Chunk(head, table, rejects_table([]), np.zeros((tiles, 1, 1, 3), np.uint8))


@contextmanager
def counted(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """CPU seconds of this process, the kernel's included; and those of the clock, of writing."""
    cpu, clock = time.process_time(), time.perf_counter()
    yield
    seconds[stage] += time.process_time() - cpu
    if stage != "replica":
        seconds["clock"] += time.perf_counter() - clock


def measure(settings: PartSettings, tiles: int, chunk: int) -> tuple[dict[str, float], int, float]:
    """CPU seconds of each stage and of the clock, bytes of output, peak of this process in MB."""
    rng = np.random.default_rng(0)
    ((name, shape),) = settings.features.items()
    values = rng.standard_normal((chunk, num_values(shape)), np.float32).astype(np.float16)

    def encode(_: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float16]]:
        return {name: values}

    seconds = dict.fromkeys(("replica", "write", "finalize", "clock"), 0.0)
    parts: list[Part] = []
    count = -(-tiles // chunk)
    for number in range(count):
        given = chunk_of(chunk, number, number == count - 1)
        with counted(seconds, "replica"):
            row = embed_chunk(given, encode, settings).dump()
        with counted(seconds, "write"):
            parts.append(write_part(Embedded.load(row), settings))
        del row
    head = parts[-1].head
    assert head.end is not None
    shard = CompleteShard("s", "s", replace(head.end), tuple(parts))
    with counted(seconds, "finalize"):
        commit = finalize_shard(shard, FinalizeSettings(settings, "0" * 64, 512 << 20))
    written = sum(part.total_bytes for part in commit.parts)
    return seconds, written, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=200, help="of tokens [default: 200]")
    parser.add_argument("--folder", type=Path, help="of the output [default: a temporary one]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    rows: list[tuple[Cell, ...]] = []
    with one_core():
        for name, format_, features in CASES:
            settings = PartSettings(Storage(), "", "run", features, "float16", ("txt",), format_)
            tile_bytes = settings.layout.tile_bytes
            tiles = options.tiles * 1000 // 50 if tile_bytes < MEGA else options.tiles
            if not rows:  # warms up: a virtual machine's memory is slow the first time it is used
                with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                    measure(replace(settings, output=folder), tiles, 10)
            for device, most in (("cpu", 32), ("cuda", 128)):
                chunk = chunk_tiles(most, tile_bytes, device)
                with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                    where = replace(settings, output=folder)
                    seconds, written, peak = measure(where, tiles, chunk)
                mega = written / MEGA
                both = mega / (seconds["write"] + seconds["finalize"])
                stages = [mega / seconds[s] for s in ("replica", "write", "finalize")]
                figures = [mega, *stages, both, mega / seconds["clock"], peak]
                rows.append((name, format_, chunk, *(f"{figure:.0f}" for figure in figures)))
                print(rows[-1], flush=True)
    table = Table(
        "Writing on one core, MB of output a CPU second",
        ("feature", "format", "tiles a chunk", "MB written", "replica", "write", "finalize",
         "write and finalize",
            "the same by the clock", "peak of the process so far, MB"),
        tuple(rows),
    )  # fmt: skip
    notes = [
        "replica: from what the encoder gave (float16) to what is handed over; write: its part "
        "file, with its crc32; finalize: part files read and compared, the output written, hashed "
        "(sha256) and published; every file is fsynced",
        "CPU seconds are those of the process and of the kernel for it; the clock's, also what it "
        "waits for the disk and for whoever else was at work",
        "1 MB = 10^6 bytes",
    ]
    print(write_result("tokens", "cpu", about, [table], notes, options.results))


if __name__ == "__main__":
    main()
