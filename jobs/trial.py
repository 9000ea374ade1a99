"""Does the CPU's part of the job to some pictures, on one core, and counts its CPU seconds.

Tiling, part files and the output are the job's own functions; the embeddings are random numbers of
the right shape. CPU seconds, not wall time: another program beside this one changes them little.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.chunks import TileSettings, tile_group
from pipeline.embedding import PartSettings, embed_chunk, write_part
from pipeline.layout import Layout
from pipeline.ledger import CompleteShard
from pipeline.records import Head, Part, ShardEnd, num_values, rejects_table, sample_schema
from pipeline.samples import GROUP_SAMPLES, GroupRow
from pipeline.stages import keep_freed_memory
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings, finalize_shard

NAME = "sample"
WRITTEN_BYTES = 256 << 20  # of part files: tokens of 200 pictures would be 10 GB


@dataclass(frozen=True)
class Trial:
    """`output_bytes` of `tiles` rows, features and all; `rejects` those that decoding brought.

    Where not all rows were written, what was is scaled up to them.
    """

    pictures: int
    tiles: int
    rejects: Counter[str]
    tile_cpu_seconds: float
    write_cpu_seconds: float
    output_bytes: int
    commit_bytes: int


def group_of(samples: Sequence[Mapping[str, Any]], carry: tuple[str, ...], number: int) -> GroupRow:
    """Samples as one group of a shard, as the reader gives them."""
    rows = [
        {**sample, "sample_index": number * GROUP_SAMPLES + index}
        for index, sample in enumerate(samples)
    ]
    table = pa.Table.from_pylist(rows, sample_schema(carry))
    return GroupRow(Head(NAME, NAME, number), table, rejects_table([]))


def try_out(
    samples: Sequence[Mapping[str, Any]],
    settings: TileSettings,
    layout: Layout,
    say: Callable[[str], None],
) -> Trial:
    """Tiles `samples`, and writes what they give up to WRITTEN_BYTES; nothing of it stays."""
    keep_freed_memory()
    rng = np.random.default_rng(0)

    def encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        return {
            name: rng.standard_normal((len(tiles), num_values(shape)), dtype=np.float32)
            for name, shape in layout.features.items()
        }

    runs = [samples[at : at + GROUP_SAMPLES] for at in range(0, len(samples), GROUP_SAMPLES)]
    parts: list[Part] = []
    rejects: Counter[str] = Counter()
    tiles = 0
    tile_seconds = write_seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="tessera-plan-") as folder:
        output = PartSettings(
            Storage(), folder, "trial", layout.features, layout.embedding_dtype, layout.carry,
            layout.format,
        )  # fmt: skip
        for number, run in enumerate(runs):
            group = group_of(run, settings.carry, number)
            began = time.process_time()
            for chunk in tile_group(group, settings):
                tile_seconds += time.process_time() - began
                tiles += chunk.rows.num_rows
                rejects.update(f"{r['stage']}/{r['error']}" for r in chunk.rejects.to_pylist())
                if sum(part.num_bytes for part in parts) < WRITTEN_BYTES:
                    embedded = embed_chunk(chunk, encode, output)
                    began = time.process_time()
                    parts.append(write_part(embedded, output))
                    write_seconds += time.process_time() - began
                began = time.process_time()
            say(f"tiled {min((number + 1) * GROUP_SAMPLES, len(samples))} pictures")
        shard = CompleteShard(NAME, NAME, ShardEnd(len(samples), 0, None), tuple(parts))
        began = time.process_time()
        commit = finalize_shard(shard, FinalizeSettings(output, "0" * 64, 1 << 40))
        write_seconds += time.process_time() - began
    scale = tiles / max(commit.tiles, 1)
    return Trial(
        pictures=len(samples),
        tiles=tiles,
        rejects=rejects,
        tile_cpu_seconds=tile_seconds,
        write_cpu_seconds=write_seconds * scale,
        output_bytes=round(sum(part.total_bytes for part in commit.parts) * scale),
        commit_bytes=len(commit.dump()),
    )
