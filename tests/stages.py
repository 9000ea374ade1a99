"""The stages of the flow as plain functions, with an encoder that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.chunks import Chunk, TileSettings, tile_group
from pipeline.commits import Format
from pipeline.embedding import Encode, PartSettings, embed_chunk, write_part
from pipeline.ledger import CompleteShard, Ledger
from pipeline.records import Shape, Shard
from pipeline.samples import GroupRow, ReadSettings, read_groups
from pipeline.storage import Storage
from pipeline.takeover import committed_rows, with_known
from pipeline.tiling import Tiling

STORAGE = Storage()
WIDTH = 6  # D of the features that `encode` gives
IMAGE_KEY = ("jpg", "jpeg", "png")
TILING = Tiling("dynamic", 28, 28, max_tiles=4)


def encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """uint8 [n, S, S, 3] → cls and mean [n, 6], different for different tiles."""
    pixels = tiles.astype(np.float32)
    cls = np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))], axis=1)
    return {"cls": cls, "mean": cls[:, ::-1] / 3}


SHAPES: dict[str, Shape] = {
    "cls": WIDTH, "mean": WIDTH, "tokens": (5, WIDTH), "tokens-2x2": (1, 4 * WIDTH)
}  # fmt: skip


def encode_all(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """`encode`, and tokens that each differ."""
    vectors = encode(tiles)
    tokens = vectors["cls"][:, np.newaxis] * np.arange(1, 6, dtype=np.float32)[:, np.newaxis]
    shuffled = tokens[:, 1:].reshape(len(tiles), 1, 4 * WIDTH)
    return {**vectors, "tokens": tokens, "tokens-2x2": shuffled}


def part_settings(
    output: Path | str,
    features: Mapping[str, Shape] | None = None,
    embedding_dtype: str = "float16",
    carry: tuple[str, ...] = (),
    run: str = "run",
    storage: Storage = STORAGE,
    format: Format = "parquet",
) -> PartSettings:
    return PartSettings(
        storage, str(output), run, features or {"cls": WIDTH}, embedding_dtype, carry, format
    )


def read_shard(
    path: Path,
    name: str = "s",
    image_key: tuple[str, ...] = IMAGE_KEY,
    carry: tuple[str, ...] = (),
    accept_truncated: bool = False,
) -> list[GroupRow]:
    settings = ReadSettings(STORAGE, image_key, carry, accept_truncated)
    return list(read_groups(Shard(str(path), name), settings))


def tile_shard(
    path: Path,
    chunk_tiles: int = 8,
    carry: tuple[str, ...] = (),
    deadline_seconds: float = 60.0,
    change: Callable[[GroupRow], GroupRow] = lambda group: group,
) -> list[Chunk]:
    settings = TileSettings(TILING, carry, deadline_seconds, chunk_tiles)
    groups = read_shard(path, carry=carry)
    return [chunk for group in groups for chunk in tile_group(change(group), settings)]


def compute_shard(
    shard: Shard,
    read: ReadSettings,
    tile: TileSettings,
    encode: Encode,
    parts: PartSettings,
    fingerprint: str = "f" * 64,
) -> CompleteShard:
    """read → tile → embed → write → ledger for one shard, which may replace a committed one."""
    ledger = Ledger([shard.name])
    complete = None
    with committed_rows(shard, parts, fingerprint) as committed:
        for group in read_groups(shard, read):
            for chunk in tile_group(with_known(group, committed), tile):
                assert complete is None, "nothing comes after the last part"
                complete = ledger.add(write_part(embed_chunk(chunk, encode, parts), parts))
    assert complete is not None
    return complete
