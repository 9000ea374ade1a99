"""The work of a tile, and the peaks it is compared with."""

from __future__ import annotations

import itertools

import pytest

from model.flop import PEAKS, peak_flops, tile_flop
from tests.checkpoints import tiny_config


def test_a_tile_through_fewer_blocks_is_less_work_by_that_many_blocks() -> None:
    config = tiny_config()
    counts = [tile_flop(config, blocks) for blocks in range(config.num_layers + 1)]
    steps = {after - before for before, after in itertools.pairwise(counts)}
    assert len(steps) == 1
    assert counts[-1] == tile_flop(config)
    # 16 patches of 14 x 14 x 3 values to 80 channels
    assert counts[0] == 2 * 16 * 14 * 14 * 3 * 80


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H200", "float32", None),
        ("NVIDIA H2", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_a_peak_is_told_only_where_it_is_known(device: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(device, dtype) == (None if tera is None else tera * 1e12)


def test_float8_is_about_twice_as_fast_everywhere() -> None:
    with_fp8 = [peaks for peaks in PEAKS.values() if "fp8" in peaks]
    assert len(with_fp8) >= 6
    for peaks in with_fp8:
        assert peaks["fp8"] / peaks["bfloat16"] == pytest.approx(2, rel=0.03)
