"""The demo's pictures in every format, feature and tiling, with the demo's network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo import DEMO_MODEL, make_shards
from model.random_checkpoint import write_random_checkpoint
from pipeline.commits import Format, read_dataset
from pipeline.formats import part_tables
from pipeline.layout import layout_of
from pipeline.vectors import feature_values
from tests.outputs import extract_plainly, read_pictures
from tests.stages import STORAGE

VECTORS = ("cls", "mean")
FEATURES = (*VECTORS, "tokens", "tokens-2x2")
TILINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"tiling": "dynamic", "max_tiles": 2, "max_upscale": 2.0},
    "center-crop": {"tiling": "center-crop"},
}
PICTURES = 12 + 6 + 7  # of the three shards; one more is cut short


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/ with the demo's shards, and ckpt/."""
    folder = tmp_path_factory.mktemp("demo")
    make_shards(folder / "in")
    write_random_checkpoint(folder / "ckpt", DEMO_MODEL, seed=0)
    return folder


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_format_has_what_parquet_has(tiling: str, demo: Path, tmp_path: Path) -> None:
    def made(format_: Format, features: tuple[str, ...]) -> tuple[Path, pa.Table]:
        output = tmp_path / f"{format_}-{'+'.join(features)}"
        options = {**TILINGS[tiling], "carry": ("txt", "json:license")}
        commits = extract_plainly(
            [demo / "in"], output, demo / "ckpt", features=features, format=format_, **options
        )
        parts = [part for commit in commits for part in commit.parts]
        if format_ == "parquet":
            return output, pa.concat_tables(pq.read_table(output / part.path) for part in parts)
        layout = layout_of(read_dataset(str(output), STORAGE))
        tables = [t for part in parts for t in part_tables(part, str(output), layout, STORAGE)]
        return output, pa.concat_tables(tables)

    parquet, plain = made("parquet", VECTORS)
    read = read_pictures(parquet, VECTORS)
    assert len(read) == PICTURES
    assert (plain.num_rows > PICTURES) == (tiling == "dynamic")
    for format_, features in (("npy", VECTORS), ("webdataset", VECTORS), ("webdataset", FEATURES)):
        output, found = made(format_, features)
        assert found.select(plain.column_names).cast(plain.schema).equals(plain)
        assert read_pictures(output, VECTORS) == read
    for name in VECTORS:
        assert made("npy", (name,))[1][name].equals(plain[name])
    tokens = feature_values(found["tokens"], 1025 * 160).reshape(-1, 1025, 160)
    np.testing.assert_array_equal(tokens[:, 0], feature_values(plain["cls"], 160))
    shuffled = feature_values(found["tokens-2x2"], 256 * 640).reshape(-1, 16, 16, 2, 2, 160)
    grid = tokens[:, 1:].reshape(-1, 16, 2, 16, 2, 160).swapaxes(2, 3)
    np.testing.assert_array_equal(shuffled, grid)
