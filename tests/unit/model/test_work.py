"""What a tile costs a network, and a rank of it."""

from __future__ import annotations

import pytest

from model.work import (
    V1_5,
    activation_bytes,
    attention_flop,
    patch_flop,
    rank_flop,
    ring_seconds,
    sums_seconds,
    tile_flop,
    weight_bytes,
)


def test_a_tile_of_the_6b_is_11_95_tflop() -> None:
    assert tile_flop(V1_5) == pytest.approx(11.95e12, rel=0.002)
    assert attention_flop(V1_5, 1, 45) == pytest.approx(0.61e12, rel=0.01)


def test_blocks_behind_the_layer_are_not_run() -> None:
    assert tile_flop(V1_5, 0) == patch_flop(V1_5)
    half = tile_flop(V1_5, 45) - tile_flop(V1_5, 22)
    assert half == pytest.approx(23 / 45 * (tile_flop(V1_5) - patch_flop(V1_5)))


def test_the_busiest_of_two_ranks_has_13_of_25_heads() -> None:
    assert rank_flop(V1_5, 1) == tile_flop(V1_5)
    heads = attention_flop(V1_5, 2, 45) / attention_flop(V1_5, 1, 45)
    assert heads == 13 / 25
    assert tile_flop(V1_5) / 2 < rank_flop(V1_5, 2) < 0.52 * tile_flop(V1_5)


def test_sums_over_ranks() -> None:
    # 6.56 MB twice a block, and 8 kB: 590 MB a tile, of which two ranks send one half twice
    seconds = sums_seconds(V1_5, 2, 45, 450e9, 0.0, 8)
    assert seconds == pytest.approx(590.8e6 / 450e9, rel=0.002)
    assert sums_seconds(V1_5, 1, 45, 450e9, 1.0, 8) == 0.0
    assert ring_seconds(8e9, 4, 1e9, 0.5) == 2 * 3 * (2.0 + 0.5)


def test_memory_of_the_6b() -> None:
    assert weight_bytes(V1_5, 1, 2.0) == pytest.approx(11.06e9, rel=0.01)
    assert weight_bytes(V1_5, 2, 2.0) == weight_bytes(V1_5, 1, 2.0) / 2
    assert activation_bytes(V1_5, 1, 8) == 8 * activation_bytes(V1_5, 1, 1)
