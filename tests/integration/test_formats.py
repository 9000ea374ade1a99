"""The demo's pictures through Ray into every format, on disk and on S3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
import torch

from jobs.demo import DEMO_MODEL, make_shards
from jobs.verify import verify
from model.features import pixel_shuffle
from model.random_checkpoint import write_random_checkpoint
from pipeline.commits import read_commits
from pipeline.read import pictures
from pipeline.storage import Storage
from tests.flows import run_flow
from tests.outputs import read_pictures
from tests.s3 import moto

SHARD = "sizes"  # pictures of one to some tiles, and a strip
PICTURES = 12 + 6 + 7  # and one that is cut short
TILINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"tiling": "dynamic", "max_tiles": 2, "max_upscale": 2.0},
    "center-crop": {"tiling": "center-crop"},
}
VECTORS = ("cls", "mean")
TOKENS = (*VECTORS, "tokens", "tokens-2x2")


@dataclass(frozen=True)
class Demo:
    """The demo's shards and its checkpoint, and an OUTPUT in Parquet of each tiling."""

    source: Path
    checkpoint: Path
    parquet: Path

    def run(self, output: Path | str, tiling: str, **options: Any) -> None:
        options = {**TILINGS[tiling], "carry": ("txt",), **options}
        tally = run_flow(self.source, output, self.checkpoint, **options)
        assert (tally.committed, tally.failures) == (3, [])


@pytest.fixture(scope="module")
def demo(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    make_shards(folder / "in")
    write_random_checkpoint(folder / "ckpt", DEMO_MODEL, seed=0)
    made = Demo(folder / "in", folder / "ckpt", folder / "parquet")
    for tiling in TILINGS:
        made.run(made.parquet / tiling, tiling, features=VECTORS)
    return made


def check_tokens(output: str, storage: Storage) -> None:
    """All tokens hold the vectors, and the shuffled ones are those of the patches."""
    for picture in pictures(output, storage):
        cls, mean, tokens, shuffled = (picture.features[name] for name in TOKENS)
        np.testing.assert_array_equal(tokens[:, 0], cls)
        patches = tokens[:, 1:]
        np.testing.assert_allclose(patches.astype(np.float32).mean(axis=1), mean, atol=5e-3)
        expected = pixel_shuffle(torch.from_numpy(patches.copy())).numpy()
        np.testing.assert_array_equal(shuffled, expected)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(
    ("format_", "features"), [("parquet", VECTORS), ("npy", VECTORS), ("webdataset", TOKENS)]
)
def test_a_reader_gets_the_same_of_every_format_on_s3(
    format_: str, features: tuple[str, ...], tiling: str, demo: Demo
) -> None:
    with moto() as server:
        output = f"{server.make_bucket('out')}/{format_}-{tiling}"
        options = {"storage_options": server.options, "format": format_, "features": features}
        demo.run(output, tiling, target_part_bytes=3_000_000, chunk_tiles=4, **options)
        storage = Storage(server.options)
        found = read_pictures(output, VECTORS, storage)
        assert len(found) == PICTURES
        assert found == read_pictures(demo.parquet / tiling, VECTORS)
        (commit,) = read_commits(output, [SHARD], storage)
        assert (len(commit.parts) > 1) == (format_ == "webdataset")
        if "tokens" in features:
            check_tokens(output, storage)
        verified = verify(
            output, inputs=(str(demo.source),), recompute=2, storage_options=server.options
        )
        assert verified.problems == ()


def test_tars_of_centre_crops_are_read_by_ray(demo: Demo, tmp_path: Path) -> None:
    demo.run(tmp_path, "center-crop", format="webdataset", features=("tokens",))
    mine = [p for p in pictures(str(tmp_path)) if p.shard == SHARD]
    read = ray.data.read_webdataset(str(tmp_path / f"embeddings/{SHARD}.tar")).take_all()
    assert [sample["json"]["key"] for sample in read] == [p.key for p in mine]
    for sample, picture in zip(read, mine, strict=True):
        np.testing.assert_array_equal(sample["0.npy"], picture.features["tokens"][0])
    assert len(mine) == 7
    assert verify(str(tmp_path), recompute=2).problems == ()
