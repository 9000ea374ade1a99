"""dataset.json alone says how the pictures were tiled; computed again, they agree or are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.config import ExtractConfig, tiling_of
from jobs.extract import describe
from jobs.recorded import recorded_settings
from model.checkpoint import Checkpoint, open_checkpoint
from model.errors import UserError
from pipeline.tiling import plan_tiles
from tests.builders import write_checkpoint
from tests.checkpoints import edit_json
from tests.outputs import (
    altered,
    check,
    edit_commit,
    extract_plainly,
    rewrite,
)

SIZES = [(1, 1), (60, 80), (640, 480), (333, 2000), (57, 56), (5000, 4000)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Tiles of 56 pixels, cut from a shortest edge of 64."""
    folder = write_checkpoint(tmp_path_factory.mktemp("ckpt"))
    edit_json(folder / "preprocessor_config.json", size=64)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resize": "fast"},
        {"tiling": "dynamic"},
        {"tiling": "dynamic", "max_tiles": 6, "thumbnail": False, "resize": "fast"},
        {"tiling": "dynamic", "max_upscale": 1.5},
    ],
)
def test_the_tiling_is_read_back(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    config = ExtractConfig(**options, input=("i",), output="o", model=checkpoint.source)
    sizes = checkpoint.preprocessor
    assert sizes.resize_to == 64
    expected = tiling_of(config, sizes.crop, sizes.resize_to)
    found = recorded_settings(describe(config, checkpoint), "o").as_tiling()
    assert (found.mode, found.tile_size, found.resize) == (expected.mode, 56, expected.resize)
    for width, height in SIZES:
        assert plan_tiles(width, height, found) == plan_tiles(width, height, expected)


def test_computed_again_the_pictures_agree(made: Path) -> None:
    found = check(made, recompute=8)
    assert found.problems == ()
    assert found.recomputed is not None
    assert found.recomputed.startswith("8 pictures, ")
    assert found.recomputed.endswith("; 0 beyond what is allowed")


def test_all_pictures_are_computed_again_where_there_are_fewer(made: Path) -> None:
    found = check(made, recompute=100, model=str(made / "ckpt"), inputs=(str(made / "in"),))
    assert found.problems == ()
    assert str(found.recomputed).startswith(f"{found.embedded} pictures, {found.tiles} tiles: ")


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_altered_values_are_found_by_computing_again(feature: str, copy: Path) -> None:
    def alter(values: np.ndarray) -> None:
        values[:] = values * np.float16(1.01)

    for shard in ("a", "a/b"):
        rewrite(copy, shard, lambda table: altered(table, feature, alter))
    found = check(copy, recompute=4)
    assert len(found.problems) == 4
    assert all(f": {feature} of tile 0 is not what" in problem for problem in found.problems)
    told = re.search(r"relative error (\S+), cosine 1\.000000,", found.problems[0])
    assert told is not None
    assert float(told[1]) == pytest.approx(0.01, rel=0.1)
    assert check(copy, recompute=4).problems == found.problems  # the same pictures again
    assert check(copy, recompute=4, seed=1).problems != found.problems


def test_another_box_is_found_by_computing_again(copy: Path) -> None:
    def shift(values: np.ndarray) -> None:
        values[:, 0] += 1

    for shard in ("a", "a/b"):
        rewrite(copy, shard, lambda table: altered(table, "tile_box", shift))
    (problem,) = check(copy, recompute=1).problems
    assert problem.endswith(
        "cannot be computed again: the stored tile_box are not those of its tiling"
    )


def test_a_source_that_is_gone_cannot_be_computed_again(copy: Path) -> None:
    found = check(copy, recompute=1, seed=3)
    assert found.problems == ()  # the commits name the source of `made`, which is there
    edit = {"url": str(copy / "nowhere.tar"), "size": 1, "etag": None}
    for shard in ("a", "a/b"):
        edit_commit(copy, shard, lambda commit: commit.update(source=edit))
    (problem,) = check(copy, recompute=1, seed=3).problems
    assert problem.endswith(f"cannot be computed again: not found in the source {edit['url']}")


def test_bfloat16_is_held_to_the_cosine(made: Path, tmp_path: Path) -> None:
    extract_plainly(
        [made / "in/a/b.tar"], tmp_path / "out", made / "ckpt", dtype="bfloat16", layer=-2
    )
    found = check(tmp_path, recompute=5)
    assert found.problems == ()
    assert "relative error up to 1.0e-04" not in str(found.recomputed)  # it is not float32

    def turn(values: np.ndarray) -> None:
        values[:, :8] *= -1

    rewrite(tmp_path, "b", lambda table: altered(table, "cls", turn))
    assert all("allowed cosine ≥ 0.999" in p for p in check(tmp_path, recompute=5).problems)
    assert len(check(tmp_path, recompute=5).problems) == 5


def test_other_weights_are_the_users_mistake(made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", kind="layer_norm")
    with pytest.raises(UserError, match=r"not those that made the output .* --model"):
        check(made, recompute=1, model=str(other))
