"""The pixels of tiles: against plain Pillow calls, against transformers, fast against exact."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from pipeline.tiling import Tiling, cut_tiles, picture_size, plan_tiles
from tests.data.make_tiling_pictures import FOLDER, encode, scene

PICTURES = Path(__file__).parents[3] / "jobs" / "pictures"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix != ".json")
PHOTOS = [path for path in sorted(PICTURES.iterdir()) if path.suffix in (".jpg", ".png", ".webp")]


def tiles_of(data: bytes, tiling: Tiling) -> NDArray[np.uint8]:
    plan = plan_tiles(*picture_size(data), tiling)
    side = tiling.tile_size
    out = np.full((plan.tile_count, side, side, 3), 7, np.uint8)
    cut_tiles(data, tiling, plan, out)
    return out


def published_tiles(data: bytes, cols: int, rows: int, side: int) -> list[Image.Image]:
    """InternVL 1.5's tiles of a picture on a given grid, crop by crop, with a thumbnail.

    Its one resize call is two here, width then height.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGB")

    def resize(width: int, height: int) -> Image.Image:
        wide = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
        return wide.resize((width, height), Image.Resampling.BICUBIC)

    whole = resize(cols * side, rows * side)
    tiles = [
        whole.crop(
            (i % cols * side, i // cols * side, (i % cols + 1) * side, (i // cols + 1) * side)
        )
        for i in range(cols * rows)
    ]
    return tiles if len(tiles) == 1 else [*tiles, resize(side, side)]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # from the plain calls
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_dynamic_tiles_are_the_published_ones(path: Path) -> None:
    data = path.read_bytes()
    tiling = Tiling("dynamic", 112, 112)
    plan = plan_tiles(*picture_size(data), tiling)
    tiles = tiles_of(data, tiling)
    expected = published_tiles(data, plan.cols, plan.rows, 112)
    assert len(tiles) == len(expected) == plan.tile_count
    np.testing.assert_array_equal(tiles, np.stack([np.asarray(tile) for tile in expected]))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # from the plain calls
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_center_crop_is_that_of_clip_image_processor(path: Path) -> None:
    # Both edges shrink alike here, where Pillow's one call and two passes give the same bytes.
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 448},
        crop_size={"height": 448, "width": 448},
        do_rescale=False,
        do_normalize=False,
    )
    data = path.read_bytes()
    picture = Image.open(io.BytesIO(data)).convert("RGB")  # as the model card does it
    expected = processor(picture, input_data_format="channels_last")["pixel_values"][0]
    tiles = tiles_of(data, Tiling("center-crop", 448, 448))
    np.testing.assert_array_equal(tiles[0], np.moveaxis(expected, 0, 2))


def test_every_file_is_what_its_name_says() -> None:
    # the two tests above show something for these modes only if Pillow still reads them so
    modes = {}
    for path in FILES:
        with Image.open(path) as picture:
            modes[path.name] = (picture.mode, picture.size)
    assert modes["grey.jpg"][0] == "L"
    assert modes["grey-alpha.png"][0] == "LA"
    assert modes["cmyk.jpg"][0] == "CMYK"
    assert modes["palette.png"][0] == modes["palette-transparent.png"][0] == "P"
    assert modes["rgba.png"][0] == modes["lossless-alpha.webp"][0] == "RGBA"
    assert modes["grey-16-bit.png"][0] == "I;16"
    assert modes["bilevel.png"][0] == "1"
    assert modes["one-pixel.png"][1] == (1, 1)
    assert modes["wide-2000x90.jpg"][1] == (2000, 90)
    assert Image.open(FOLDER / "exif-rotated.jpg").getexif()[0x0112] == 6
    assert modes["exif-rotated.jpg"][1] == (320, 200)  # not turned
    assert Image.open(FOLDER / "progressive.jpg").info["progressive"] == 1


def test_tiles_lie_in_reading_order() -> None:
    colours = np.arange(1, 7, dtype=np.uint8).reshape(2, 3) * 40  # 2 rows, 3 columns of flat tiles
    pixels = np.repeat(np.kron(colours, np.ones((64, 64), np.uint8))[:, :, None], 3, axis=2)
    tiles = tiles_of(encode(Image.fromarray(pixels), "PNG"), Tiling("dynamic", 64, 64, 6))
    assert [int(tile[32, 32, 0]) for tile in tiles[:6]] == [40, 80, 120, 160, 200, 240]
    assert tiles[6, 4, 4, 0] == 40
    assert tiles[6, 59, 59, 0] == 240  # the thumbnail shows all of them


def test_tiles_are_written_into_a_view_and_nowhere_else() -> None:
    data = (FOLDER / "colour-420.jpg").read_bytes()
    tiling = Tiling("dynamic", 56, 56)
    plan = plan_tiles(*picture_size(data), tiling)
    chunk = np.full((plan.tile_count + 4, 56, 56, 3), 99, np.uint8)
    cut_tiles(data, tiling, plan, chunk[3:-1])
    np.testing.assert_array_equal(chunk[3:-1], tiles_of(data, tiling))
    assert (chunk[:3] == 99).all()
    assert (chunk[-1] == 99).all()
    for wrong in (chunk, chunk[3:-1].astype(np.int16), chunk[3:-1, :55]):
        with pytest.raises(ValueError, match="out is"):
            cut_tiles(data, tiling, plan, wrong)


@pytest.mark.parametrize("mode", ["dynamic", "center-crop"])
def test_fast_is_at_most_two_levels_off(mode: str) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    noise = [
        encode(Image.fromarray(rng.integers(0, 2, (h, w, 3), dtype=np.uint8) * 255), "PNG")
        for w, h in [(768, 710), (130, 901), (3, 5)]
    ]
    pictures = [path.read_bytes() for path in [*FILES, *PHOTOS]] + noise
    assert len(pictures) >= 22 + 12 + 3
    for data in pictures:
        exact = tiles_of(data, Tiling(mode, 448, 448, max_tiles=4))
        fast = tiles_of(data, Tiling(mode, 448, 448, max_tiles=4, resize="fast"))
        difference = np.abs(exact.astype(np.int16) - fast)
        assert difference.max() <= 2
        assert difference.mean() < 0.1


def test_tiling_leaves_pillow_and_warnings_as_they_were() -> None:
    # 100 million pixels: above the limit where Pillow warns, below the one where it refuses
    data = encode(Image.new("1", (10_000, 10_000)), "PNG")
    before = (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert picture_size(data) == (10_000, 10_000)
        small = encode(scene(40, 30, 0), "PNG")
        tiles_of(small, Tiling("dynamic", 56, 56))
        tiles_of(small, Tiling("dynamic", 56, 56, resize="fast"))
    assert seen == []
    after = (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    assert after == before == (before[0], False, 89_478_485)
