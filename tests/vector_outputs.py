"""OUTPUT in its real layout, made of given vectors: no tars, no model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import (
    Commit,
    Dataset,
    PartFile,
    Source,
    StageSeconds,
    commit_url,
    open_output,
)
from pipeline.generations import generation_of, objects_of, part_paths
from pipeline.layout import layout_of
from pipeline.records import embedding_schema
from pipeline.storage import Storage, join

Values = Mapping[str, npt.NDArray[np.floating]]


def vector_dataset(
    features: Mapping[str, int], carry: Sequence[str] = ("txt",), **settings: Any
) -> Dataset:
    """`dataset.json` of pictures that are cut dynamically, with thumbnails."""
    defaults = {
        "tiling": "dynamic",
        "thumbnail": True,
        "embedding_dtype": "float16",
        "image_key": ["jpg"],
        "carry": list(carry),
    }
    return Dataset.describe("m", None, "w" * 64, {**defaults, **settings}, dict(features), "0.1.0")


def rows_of(
    dataset: Dataset,
    values: Values,
    tile_counts: Sequence[int],
    keys: Sequence[str],
    word: str,
    images: Sequence[bytes],
) -> pa.Table:
    """A row per tile; carried members are `<word> <key>`, digests those of `images`."""
    counts = np.asarray(tile_counts, np.int64)
    of_picture = np.repeat(np.arange(len(counts)), counts)
    tile = np.arange(len(of_picture)) - np.repeat(np.cumsum(counts) - counts, counts)
    n = len(of_picture)
    schema = embedding_schema(
        dataset.features, dataset.settings["embedding_dtype"], tuple(dataset.settings["carry"])
    )
    key = pa.array(keys, pa.string()).take(pa.array(of_picture))
    digests = [hashlib.sha256(image).digest() for image in images]
    columns: dict[str, Any] = {
        "key": key,
        "sample_index": of_picture,
        "tile_index": tile,
        "tile_count": counts[of_picture],
        "is_thumbnail": (tile == counts[of_picture] - 1) & (counts[of_picture] > 1),
        "tile_box": pa.FixedSizeListArray.from_arrays(
            pa.array(np.tile(np.float32([0, 0, 448, 448]), n)), 4
        ),
        "width": np.full(n, 448),
        "height": np.full(n, 448),
        "image_sha256": pa.array(digests, pa.binary(32)).take(pa.array(of_picture)),
    }
    for name, width in dataset.features.items():
        stored = values[name].astype(dataset.settings["embedding_dtype"])
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), width)
    for name in dataset.settings["carry"]:
        columns[name] = pa.array([f"{word} {k}" for k in keys]).take(pa.array(of_picture))
    arrays = [pa.array(columns[f.name]).cast(f.type) for f in schema]
    return pa.table(arrays, schema=schema)


def put_shard(
    output: str,
    dataset: Dataset,
    name: str,
    values: Values,
    storage: Storage,
    *,
    tile_counts: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    word: str = "caption of",
    num_parts: int = 1,
    group_rows: int = 8,
    before: Commit | None = None,
    source: Source | None = None,
    images: Sequence[bytes] | None = None,
) -> Commit:
    """Publishes a shard and commits it; what a commit `before` names stays: see `sweep`."""
    open_output(output, dataset, storage)
    num_rows = len(next(iter(values.values())))
    counts = [1] * num_rows if tile_counts is None else list(tile_counts)
    keys = keys or [f"{name}-{number:05d}" for number in range(len(counts))]
    images = images or [key.encode() for key in keys]
    table = rows_of(dataset, values, counts, keys, word, images)
    generation = 1 if before is None else generation_of(before) + 1
    bounds = np.linspace(0, len(counts), num_parts + 1).astype(int)
    first_rows = np.append(0, np.cumsum(counts, dtype=np.int64))[bounds]
    parts = []
    paths = part_paths(name, generation, num_parts, layout_of(dataset))
    for (path,), start, end in zip(paths, first_rows[:-1], first_rows[1:], strict=True):
        sink = io.BytesIO()
        leaves = [f"{feature}.list.element" for feature in dataset.features]
        pq.write_table(
            table.slice(start, end - start),
            sink,
            row_group_size=group_rows,
            compression={"key": "zstd", **dict.fromkeys(leaves, "none")},
            use_dictionary=False,
            write_statistics=False,
        )
        data = sink.getbuffer()
        storage.publish_bytes(join(output, path), bytes(data))
        digest = hashlib.sha256(data).hexdigest()
        parts.append(PartFile(path=path, bytes=len(data), sha256=digest, rows=int(end - start)))
    commit = Commit(
        schema_version=1,
        fingerprint=dataset.fingerprint,
        shard=name,
        source=source or Source(url=f"in/{name}.tar", size=0, etag=None),
        samples=len(counts),
        tiles=num_rows,
        rejects=0,
        truncated_at=None,
        parts=tuple(parts),
        rejects_part=None,
        computed=(),
        seconds=StageSeconds(read=0, tile=0, embed=0, write=0),
        committed_at="2026-11-24T12:00:00+00:00",
    )
    storage.publish_bytes(commit_url(output, name), commit.dump())
    return commit


def sweep(output: str, commit: Commit, storage: Storage) -> None:
    """Removes the objects of a commit that has been replaced, or removed."""
    storage.remove_objects(*(join(output, path) for path in objects_of(commit)))


def drop_shard(output: str, commit: Commit, storage: Storage) -> None:
    """What `reindex --prune` does."""
    storage.remove_objects(commit_url(output, commit.shard))
    sweep(output, commit, storage)


class Switching(Storage):
    """Makes another version the current one right after `current.json` was looked for."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act: Callable[[], object] | None = act

    def exists(self, url: str) -> bool:
        there = super().exists(url)
        if url.endswith("/current.json") and self._act is not None:
            act, self._act = self._act, None
            act()
        return there


def clustered(num: int, width: int, seed: int, clusters: int = 8) -> npt.NDArray[np.float32]:
    """Seeded vectors [num, width] around a few centres that every seed shares."""
    centres = np.random.default_rng(12345).standard_normal((clusters, width))
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num, width)) / np.sqrt(1 + np.arange(width))
    return (centres[rng.integers(clusters, size=num)] + noise).astype(np.float32)
