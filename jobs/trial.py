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
from pipeline.ledger import CompleteShard
from pipeline.records import Head, Part, ShardEnd, rejects_table, sample_schema
from pipeline.samples import GROUP_SAMPLES, GroupRow
from pipeline.stages import keep_freed_memory
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings, finalize_shard

NAME = "sample"


@dataclass(frozen=True)
class Trial:
    """`output_bytes` of `tiles` rows, features and all; `rejects` those that decoding brought."""

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
    features: Mapping[str, int],
    embedding_dtype: str,
    say: Callable[[str], None],
) -> Trial:
    """Tiles and writes `samples`; nothing of it stays."""
    keep_freed_memory()
    rng = np.random.default_rng(0)

    def encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        return {
            name: rng.standard_normal((len(tiles), width), dtype=np.float32)
            for name, width in features.items()
        }

    runs = [samples[at : at + GROUP_SAMPLES] for at in range(0, len(samples), GROUP_SAMPLES)]
    parts: list[Part] = []
    tile_seconds = write_seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="tessera-plan-") as folder:
        output = PartSettings(Storage(), folder, "trial", features, embedding_dtype, settings.carry)
        for number, run in enumerate(runs):
            group = group_of(run, settings.carry, number)
            began = time.process_time()
            for chunk in tile_group(group, settings):
                tile_seconds += time.process_time() - began
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
    return Trial(
        pictures=len(samples),
        tiles=commit.tiles,
        rejects=shard.rejects,
        tile_cpu_seconds=tile_seconds,
        write_cpu_seconds=write_seconds,
        output_bytes=sum(part.bytes for part in commit.parts),
        commit_bytes=len(commit.dump()),
    )
