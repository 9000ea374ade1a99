"""Which tiles a picture has: grids, boxes, sizes and rounding. No pixels are resized here."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.image_transforms import center_crop, get_resize_output_image_size
from transformers.image_utils import ChannelDimension

from pipeline.pictures import MAX_PIXELS
from pipeline.tiling import PictureError, Tiling, plan_tiles

MAX_TILES = (1, 2, 6, 12)


def dynamic(max_tiles: int, tile_size: int = 448, **options: object) -> Tiling:
    return Tiling("dynamic", tile_size, tile_size, max_tiles, **options)


def published_grid(width: int, height: int, max_num: int, image_size: int) -> tuple[int, int]:
    """InternVL 1.5's choice of a grid, said again from the published algorithm, min_num 1.

    All (i, j) with 1 <= i*j <= max_num in the order of i*j; the first of the closest i/j wins
    unless a later one is as close and the picture has more than half that grid's pixels.
    """
    ratios = {
        (i, j)
        for n in range(1, max_num + 1)
        for i, j in itertools.product(range(1, n + 1), repeat=2)
        if 1 <= i * j <= max_num
    }
    chosen, smallest = (1, 1), float("inf")
    for i, j in sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]):
        distance = abs(width / height - i / j)
        if distance < smallest or (
            distance == smallest and width * height > 0.5 * image_size * image_size * i * j
        ):
            chosen, smallest = (i, j), distance
    return chosen


def midpoints(max_num: int) -> Iterator[tuple[int, int]]:
    """Sizes whose aspect lies exactly between two grids' aspects, small and large."""
    ratios = [(c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= max_num]
    for (a, b), (c, d) in itertools.combinations(ratios, 2):
        for scale in (1, 37, 180):
            yield (a * d + c * b) * scale, 2 * b * d * scale


@pytest.mark.parametrize("max_tiles", MAX_TILES)
def test_grid_is_the_published_one_for_ordinary_sizes(max_tiles: int) -> None:
    rng = np.random.default_rng(max_tiles)
    sizes = np.exp(rng.uniform(0, np.log(6000), (3000, 2))).astype(int)
    grids = set()
    for width, height in sizes.tolist():
        plan = plan_tiles(width, height, dynamic(max_tiles))
        assert (plan.cols, plan.rows) == published_grid(width, height, max_tiles, 448)
        grids.add((plan.cols, plan.rows))
    # every aspect ratio there is has been chosen at least once
    assert len({c / r for c, r in grids}) == len(
        {c / r for c in range(1, 13) for r in range(1, 13) if c * r <= max_tiles}
    )


@pytest.mark.parametrize("max_tiles", MAX_TILES)
def test_grid_is_the_published_one_at_ties(max_tiles: int) -> None:
    tiling = dynamic(max_tiles, tile_size=14)  # small: areas on both sides of half
    # 1:1, 2:1 … are tied between grids of several sizes, midpoints between neighbours
    sizes = [*itertools.product(range(1, 64), repeat=2), *midpoints(max_tiles)]
    for width, height in sizes:
        plan = plan_tiles(width, height, tiling)
        assert (plan.cols, plan.rows) == published_grid(width, height, max_tiles, 14)


def test_a_tie_at_exactly_half_the_pixels_stays_with_the_smaller_grid() -> None:
    # 9:40 lies halfway between 1:5 and 1:4, and 9·40 = 12·12·5 / 2
    plan = plan_tiles(9, 40, dynamic(6, tile_size=12))
    assert (plan.cols, plan.rows) == published_grid(9, 40, 6, 12) == (1, 4)
    # 9:20 halfway between 2:5 and 1:2, and 9·20 = 6·6·2·5 / 2
    plan = plan_tiles(9, 20, dynamic(12, tile_size=6))
    assert (plan.cols, plan.rows) == published_grid(9, 20, 12, 6) == (2, 4)
    plan = plan_tiles(18, 40, dynamic(12, tile_size=6))
    assert (plan.cols, plan.rows) == published_grid(18, 40, 12, 6) == (2, 5)


def test_grid_by_hand() -> None:
    def grid(width: int, height: int, **options: object) -> tuple[int, int]:
        plan = plan_tiles(width, height, dynamic(12, **options))
        return plan.cols, plan.rows

    assert grid(400, 300) == (4, 3)
    assert grid(300, 400) == (3, 4)
    assert grid(2000, 90) == (12, 1)
    assert grid(1, 1) == (1, 1)
    # 1:1, area against half of 2×2 and 3×3 tiles: 401 408 and 903 168 pixels
    assert (grid(633, 633), grid(634, 634)) == ((1, 1), (2, 2))
    assert (grid(950, 950), grid(951, 951)) == ((2, 2), (3, 3))


def test_thumbnail_comes_with_more_than_one_tile_and_only_when_asked() -> None:
    assert plan_tiles(400, 300, dynamic(12)).tile_count == 13
    assert plan_tiles(400, 300, dynamic(12)).has_thumbnail
    assert plan_tiles(400, 300, dynamic(12)).boxes[-1] == (0.0, 0.0, 400.0, 300.0)
    assert plan_tiles(400, 300, dynamic(12, thumbnail=False)).tile_count == 12
    assert plan_tiles(300, 300, dynamic(12)).tile_count == 1
    assert not plan_tiles(300, 300, dynamic(12)).has_thumbnail


def test_max_upscale_rules_out_grids_that_enlarge_more() -> None:
    def grid(width: int, height: int, max_upscale: float) -> tuple[int, int]:
        plan = plan_tiles(width, height, dynamic(12, max_upscale=max_upscale))
        return plan.cols, plan.rows

    # 400×300: 4×3 enlarges 4.48 times, 2×1 2.24 in width, 1×2 2.99 in height
    assert grid(400, 300, 4.48) == (4, 3)
    assert grid(400, 300, 4.47) == (3, 2)
    assert grid(400, 300, 2.24) == (1, 1)
    assert grid(100, 100, 1.0) == (1, 1)  # 1×1 enlarges too, and is always left
    assert grid(1792, 1344, 1.0) == (4, 3)
    assert grid(1791, 1344, 1.0) == (3, 2)


widths = st.integers(1, 5000)


@settings(max_examples=400, deadline=None)
@given(widths, widths, st.integers(1, 12), st.none() | st.floats(0.5, 8), st.booleans())
def test_dynamic_boxes_tile_the_picture(
    width: int, height: int, max_tiles: int, max_upscale: float | None, thumbnail: bool
) -> None:
    tiling = dynamic(max_tiles, max_upscale=max_upscale, thumbnail=thumbnail)
    plan = plan_tiles(width, height, tiling)
    assert 1 <= plan.cols * plan.rows <= max_tiles
    assert plan.has_thumbnail == (thumbnail and plan.cols * plan.rows > 1)
    assert plan.tile_count == plan.cols * plan.rows + plan.has_thumbnail == len(plan.boxes)
    if max_upscale is not None and plan.cols * plan.rows > 1:
        assert max(plan.cols * 448 / width, plan.rows * 448 / height) <= max_upscale
    grid = np.array(plan.boxes[: plan.cols * plan.rows]).reshape(plan.rows, plan.cols, 4)
    lefts, tops, rights, bottoms = np.moveaxis(grid, 2, 0)
    # neighbours share their edges exactly, and the outer edges are the picture's
    assert (lefts[:, 0] == 0).all()
    assert (tops[0] == 0).all()
    assert (rights[:, -1] == width).all()
    assert (bottoms[-1] == height).all()
    assert (rights[:, :-1] == lefts[:, 1:]).all()
    assert (bottoms[:-1] == tops[1:]).all()
    # a tile's box, taken to the resized picture, is the tile
    scale = np.array([plan.cols * 448 / width, plan.rows * 448 / height] * 2)
    rows, cols = np.mgrid[: plan.rows, : plan.cols]
    corners = np.stack([cols, rows, cols + 1, rows + 1], axis=2) * 448
    np.testing.assert_allclose(grid * scale, corners, rtol=1e-12, atol=1e-9)


@settings(max_examples=400, deadline=None)
@given(widths, widths, st.sampled_from([(448, 448), (224, 224), (224, 256), (336, 341)]))
def test_center_crop_has_the_geometry_of_transformers(
    width: int, height: int, sizes: tuple[int, int]
) -> None:
    tile_size, resize_to = sizes
    assume(max(width, height) < 800 * min(width, height))  # thinner ones are rejects
    plan = plan_tiles(width, height, Tiling("center-crop", tile_size, resize_to))
    assert (plan.cols, plan.rows, plan.tile_count, plan.has_thumbnail) == (1, 1, 1, False)

    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    first = ChannelDimension.FIRST
    resized_height, resized_width = get_resize_output_image_size(
        picture, resize_to, default_to_square=False, input_data_format=first
    )
    shape = (1, resized_height, resized_width)
    columns = np.broadcast_to(np.arange(resized_width), shape)
    lines = np.broadcast_to(np.arange(resized_height)[:, None], shape)
    crop = (tile_size, tile_size)
    columns = center_crop(columns, crop, input_data_format=first)[0]
    lines = center_crop(lines, crop, input_data_format=first)[0]
    left, top = int(columns[0, 0]), int(lines[0, 0])
    assert columns.shape == crop
    expected = (
        left * width / resized_width,
        top * height / resized_height,
        (left + tile_size) * width / resized_width,
        (top + tile_size) * height / resized_height,
    )
    assert plan.boxes == (expected,)


def test_a_picture_too_thin_to_resize_is_an_error_of_its_own() -> None:
    center = Tiling("center-crop", 448, 448)
    limit = MAX_PIXELS // 448  # longest edge of the resized picture
    for size in [(1, limit // 448), (limit // 448, 1)]:
        assert plan_tiles(*size, center).tile_count == 1
    for size in [(1, limit // 448 + 1), (limit // 448 + 1, 1)]:
        with pytest.raises(PictureError, match="pixels would be resized by way of") as caught:
            plan_tiles(*size, center)
        assert (caught.value.stage, caught.value.code) == ("tile", "extreme-aspect")
    # width first: 448 wide and as tall as the picture, which is far taller than its 12 tiles
    assert plan_tiles(9, limit, dynamic(12)).rows == 12
    with pytest.raises(PictureError):
        plan_tiles(9, limit + 1, dynamic(12))


def test_what_cannot_be_meant_is_refused() -> None:
    for width, height in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="has no tiles"):
            plan_tiles(width, height, dynamic(12))
    with pytest.raises(ValueError, match="resize_to 224 is below tile_size 448"):
        Tiling("center-crop", 448, 224)
    with pytest.raises(ValueError, match="max_upscale 0"):
        dynamic(12, max_upscale=0)
    with pytest.raises(ValueError, match="max_tiles 0"):
        dynamic(0)
    with pytest.raises(ValueError, match="want 'center-crop' or 'dynamic'"):
        Tiling("tiles", 448, 448)
    with pytest.raises(ValueError, match="want 'exact' or 'fast'"):
        Tiling("dynamic", 448, 448, resize="quick")
