"""The real read and tile stages over one archive in this process, and the balance of what came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.chunks import Chunk, TileSettings
from pipeline.records import ShardEnd
from pipeline.samples import ReadSettings
from pipeline.stages import read_stage, tile_stage
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings
from tests.stages import STORAGE, part_settings

IMAGE_KEY = ("jpg", "jpeg", "png", "webp", "tif", "gif", "bmp", "avif", "ppm")
CARRY = ("txt", "json:url")
TILING = Tiling("dynamic", 28, 28, max_tiles=4)

# Every code that reading and tiling may give; docs/output.md lists them.
CODES = {
    "read/no-image",
    "read/duplicate-member",
    "read/too-many-members",
    "read/oversized",
    "read/truncated",
    "decode/unidentified",
    "decode/truncated",
    "decode/decode-error",
    "decode/zero-size",
    "decode/decompression-bomb",
    "decode/size-mismatch",
    "decode/deadline",
    "decode/crashed",
    "decode/memory",
    "tile/extreme-aspect",
}


class CountedAttempts:
    """What the actor does in a real job."""

    def __init__(self, earlier: int = 0) -> None:
        self.earlier = earlier
        self.finished: list[str] = []

    def begin(self, name: str) -> int:
        return self.earlier

    def finish(self, name: str) -> None:
        self.finished.append(name)


@dataclass(frozen=True)
class Outcome:
    """What became of the samples of a shard, by sample_index; keys in order."""

    end: ShardEnd
    embedded: dict[int, str]
    rejects: dict[int, tuple[str, str]]
    carried: dict[int, tuple[str | None, str | None]]
    messages: tuple[str, ...]


def run_stages(
    path: Path,
    accept_truncated: bool = False,
    deadline_seconds: float = 60.0,
    tiling: Tiling = TILING,
    attempts: CountedAttempts | None = None,
) -> list[Chunk]:
    read = ReadSettings(STORAGE, IMAGE_KEY, CARRY, accept_truncated)
    tile = TileSettings(tiling, CARRY, deadline_seconds, 8)
    output = FinalizeSettings(part_settings(path.parent), "", 1)  # nothing is committed there
    columns = {"url": str(path), "name": "s", "before": ""}
    shard = {name: np.array([value], object) for name, value in columns.items()}
    attempts = attempts or CountedAttempts()
    return [
        Chunk.load(chunk)
        for group in read_stage(shard, read, output)
        for chunk in tile_stage(group, tile, attempts)
    ]


def balance(chunks: list[Chunk]) -> Outcome:
    """Checks that every sample has exactly one end, with a code that is known."""
    end = chunks[-1].head.end
    assert end is not None
    assert all(chunk.head.end is None for chunk in chunks[:-1])
    embedded: dict[int, str] = {}
    rejects: dict[int, tuple[str, str]] = {}
    carried: dict[int, tuple[str | None, str | None]] = {}
    messages: list[str] = []
    for chunk in chunks:
        assert len(chunk.tiles) == chunk.rows.num_rows
        for row in chunk.rows.to_pylist():
            assert embedded.setdefault(row["sample_index"], row["key"]) == row["key"]
            carried[row["sample_index"]] = (row["txt"], row["json:url"])
        for row in chunk.rejects.to_pylist():
            assert row["sample_index"] not in rejects
            code = f"{row['stage']}/{row['error']}"
            assert code in CODES, row
            assert row["message"].isprintable(), row
            assert len(row["message"]) < 500
            rejects[row["sample_index"]] = (row["key"], code)
            messages.append(row["message"])
    assert not embedded.keys() & rejects.keys()
    if end.failure is None:
        assert embedded.keys() | rejects.keys() == set(range(end.samples))
    else:
        assert end.failure.isprintable()
    return Outcome(end, embedded, rejects, carried, tuple(messages))
