"""What a rank holds, does and sends: counted, by formula, and added up over the ranks."""

from __future__ import annotations

from math import prod

import pytest
import torch

from benchmarks.tensor_parallel import Link, largest_share, run, share_of, sums_seconds
from model.errors import UserError
from model.split import part_of
from model.tensor_names import parameter_shapes
from model.work import V1_5, block_flop, sum_bytes, tile_flop
from tests.checkpoints import KINDS, tiny_config


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_add_up_to_the_whole(kind: str, size: int) -> None:
    config = tiny_config(kind)
    shares = [share_of(config, rank, size) for rank in range(size)]
    assert sum(share.num_heads for share in shares) == 5
    assert sum(share.num_columns for share in shares) == 320
    assert sum(share.flop for share in shares) == block_flop(config, 5, 320)
    for share in shares:
        assert share.flop == block_flop(config, share.num_heads, share.num_columns)
        assert share.sums == sum_bytes(config)
    assert largest_share(config, size) == shares[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_design(kind: str) -> None:
    config = tiny_config(kind)  # 17 tokens of 80
    squares = (17 * 2 * 4,) if kind == "rms_norm" else ()
    assert sum_bytes(config) == (*squares, 17 * 80 * 2, 17 * 80 * 2)
    assert share_of(config, 1, 3).sums == sum_bytes(config)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_parts_of_the_split(kind: str, size: int) -> None:
    config = tiny_config(kind)
    for rank in range(size):
        numel = 0
        for name, shape in parameter_shapes(config).items():
            part = part_of(name, config, rank, size)
            if part is not None and part.dim is None:
                numel += prod(shape)
            elif part is not None:
                own = sum(stop - start for start, stop in part.spans)
                numel += prod(shape) // shape[part.dim] * own
        assert share_of(config, rank, size).weight_bytes == 2 * numel


def test_the_6b() -> None:
    whole, half = largest_share(V1_5, 1), largest_share(V1_5, 2)
    assert 45 * whole.flop == pytest.approx(tile_flop(V1_5), rel=0.002)
    assert whole.weight_bytes == pytest.approx(11.08e9, rel=0.002)
    assert half.num_heads == 13
    assert half.num_columns == 6400
    assert half.sums == (1025 * 2 * 4, 6_560_000, 6_560_000)
    assert half.flop / whole.flop == pytest.approx(0.507, abs=0.001)


def test_a_ring() -> None:
    link = Link("a link", 100e9, 1e-6)
    assert link.seconds(1e9, 4) == pytest.approx(2 * 3 / 4 * 0.01 + 6e-6)
    assert link.seconds(1e9, 2) == pytest.approx(0.01 + 2e-6)
    assert link.seconds(1e9, 1) == 0
    # 6.56 MB twice over 360 GB/s, and the latency of three sums shared by 32 tiles
    nvlink = Link("NVLink", 360e9, 3.4e-6)
    assert sums_seconds(nvlink, largest_share(V1_5, 2), 2, 32) == pytest.approx(
        (2 * 6.56e6 + 8200) / 360e9 + 3 * 2 * 3.4e-6 / 32, rel=1e-6
    )


def test_more_ranks_than_heads() -> None:
    with pytest.raises(UserError, match="the checkpoint has 5 heads: use 1 to 5"):
        largest_share(tiny_config(), 6)


def test_the_whole_program_on_a_small_network() -> None:
    config = tiny_config()
    (full, small, blocks, modelled), notes = run(config, (1, 2, 5), 2, torch.device("cpu"))
    assert [row[0] for row in full.rows] == [1, 2, 4, 8]
    # ranks, heads, MLP columns; 320 columns in units of 16 over 5
    assert [row[:3] for row in small.rows] == [(1, 5, 320), (2, 3, 160), (5, 1, 64)]
    assert [row[5] for row in small.rows] == pytest.approx([100, 53.1, 20], abs=3)
    assert [row[-1] for row in small.rows] == pytest.approx([0, 5576e-6, 8 / 5 * 5576e-6], rel=1e-3)
    milliseconds = {row[0]: row[1] for row in blocks.rows}
    assert set(milliseconds) == {1, 2, 5}
    assert min(milliseconds.values()) > 0
    assert [row[0] for row in modelled.rows] == [1, 2, 2, 2, 2, 5, 5, 5, 5]
    for size, link, work, sums, tiles_per_second, a_gpu in modelled.rows:
        assert work == pytest.approx(3 * milliseconds[size] / 2, rel=0.002)
        assert (sums == 0) == (size == 1) == (link is None)
        assert tiles_per_second == pytest.approx(1000 / (work + sums), rel=0.002)
        assert a_gpu == pytest.approx(tiles_per_second / size, rel=0.002)
    links = ["NVLink 4", "NVLink 3", "PCIe 5 x16", "PCIe 4 x16"]
    assert [row[1] for row in modelled.rows[-4:]] == links
    sums_milliseconds = [row[3] for row in modelled.rows[-4:]]
    assert sums_milliseconds == sorted(sums_milliseconds)
    # hardly anything but the latency of eight steps, in three sums of three blocks for two tiles
    assert sums_milliseconds[0] == pytest.approx(3 * 3 * 8 * 3.4e-3 / 2, rel=0.01)
    assert any("NVLink 4 360 GB/s" in note for note in notes)
