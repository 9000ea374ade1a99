"""OUTPUT made without Ray, by the stages as plain functions; and how to change what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import ExtractConfig, tiling_of
from jobs.extract import describe
from jobs.verify import Verification, verify
from model.checkpoint import open_checkpoint
from model.encoder import Encoder
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, open_output
from pipeline.embedding import PartSettings
from pipeline.read import pictures
from pipeline.samples import ReadSettings
from pipeline.shards import list_shards
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.stages import STORAGE, compute_shard

BAD_PICTURE = 4  # sample_index in shard `a` of the output that tests share
MEMBERS = 3  # of each of its samples


def extract_plainly(
    inputs: Sequence[Path], output: Path, checkpoint: Path, chunk_tiles: int = 16, **options: Any
) -> list[Commit]:
    """What `extract` does, in this process and in order, with small chunks."""
    config = ExtractConfig(
        **{"dtype": "float32", **options},
        input=tuple(map(str, inputs)),
        output=str(output),
        model=str(checkpoint),
    )
    opened = open_checkpoint(config.model)
    dataset = describe(config, opened)
    open_output(config.output, dataset, STORAGE)
    encoder = Encoder.load(
        opened,
        dtype=config.dtype,
        device="cpu",
        layer=config.layer,
        features=config.features,
        embedding_dtype=config.embedding_dtype,
    )
    parts = PartSettings(
        STORAGE,
        config.output,
        "run",
        dataset.features,
        config.embedding_dtype,
        config.carry,
        config.format,
    )
    read = ReadSettings(STORAGE, config.image_key, config.carry, config.accept_truncated)
    preprocessor = opened.preprocessor
    tiling = tiling_of(config, preprocessor.crop, preprocessor.resize_to)
    tile = TileSettings(tiling, config.carry, 60.0, chunk_tiles)
    finalize = FinalizeSettings(parts, dataset.fingerprint, int(config.target_part_bytes))
    commits = []
    for shard in list_shards(config.input, STORAGE):
        complete = compute_shard(shard, read, tile, encoder.encode, parts)
        assert complete.failure is None, complete.failure
        commits.append(finalize_shard(complete, finalize))
    STORAGE.remove(f"{config.output}/_runs")
    return commits


def read_pictures(
    output: Path | str, features: Sequence[str], storage: Storage = STORAGE
) -> list[dict[str, Any]]:
    """All that a reader gets of each picture, arrays as type, shape and digest."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
        return {n: plain(v) for n, v in value.items()} if isinstance(value, dict) else value

    return [plain(vars(picture)) for picture in pictures(str(output), storage, features=features)]


def check(root: Path, **options: Any) -> Verification:
    return verify(str(root / "out"), **options)


def edit_commit(root: Path, shard: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = root / f"out/commits/{shard}.json"
    commit = json.loads(path.read_text())
    edit(commit)
    path.write_text(json.dumps(commit))


def rewrite(root: Path, shard: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Changes the rows of a shard; its commit gets their bytes, sha256 and counts."""
    path = root / f"out/embeddings/{shard}.parquet"
    table = edit(pq.read_table(path))
    pq.write_table(table, path)

    def follow(commit: dict[str, Any]) -> None:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        commit["parts"][0] |= {"bytes": len(data), "sha256": digest, "rows": table.num_rows}
        commit["tiles"] = table.num_rows

    edit_commit(root, shard, follow)


def altered(table: pa.Table, name: str, change: Callable[[np.ndarray], None]) -> pa.Table:
    """The table with a feature [n, D] changed in place."""
    kind = table.schema.field(name).type
    flat = table[name].combine_chunks().flatten().to_numpy().copy()
    change(flat.reshape(-1, kind.list_size))
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), kind.list_size)
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)
