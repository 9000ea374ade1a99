"""The contact sheet and `inspect`: every tile is drawn, where the sheet says it is."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from jobs.contact_sheet import (
    ACCENT,
    CARD,
    CARD_FILL,
    MARGIN,
    REJECT_FILL,
    DrawnPicture,
    Rect,
    caption,
    describe,
    draw_card,
    draw_contact_sheet,
)
from jobs.inspect import inspect_picture
from model.errors import UserError
from pipeline.tiling import TilePlan, Tiling, cut_tiles, picture_size, plan_tiles
from tests.data.make_tiling_pictures import FOLDER, encode, scene

DYNAMIC = Tiling("dynamic", 112, 112)
CENTER = Tiling("center-crop", 112, 112)


def tiles_of(data: bytes, tiling: Tiling) -> NDArray[np.uint8]:
    plan = plan_tiles(*picture_size(data), tiling)
    out = np.empty((plan.tile_count, tiling.tile_size, tiling.tile_size, 3), np.uint8)
    cut_tiles(data, tiling, plan, out)
    return out


def assert_tiles_are_drawn(
    image: Image.Image, drawn: DrawnPicture, data: bytes, tiling: Tiling
) -> None:
    tiles = tiles_of(data, tiling)
    assert len(tiles) == len(drawn.tiles)
    for tile, place in zip(tiles, drawn.tiles, strict=True):
        side = place[2] - place[0]
        assert side == place[3] - place[1] >= 6
        small = Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(image.crop(place)), np.asarray(small))


def overlap(one: Rect, other: Rect) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_sheet_shows_every_tile_of_every_picture(tmp_path: Path) -> None:
    names = ["colour-420.jpg", "wide-2000x90.jpg", "tall-60x1500.jpg", "one-pixel.png", "rgba.png"]
    pictures = [(name, (FOLDER / name).read_bytes()) for name in names]
    drawn = draw_contact_sheet(pictures, DYNAMIC, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.format == "PNG"
    assert sheet.width == 2 * CARD[0] + 3 * MARGIN
    assert [one.name for one in drawn] == names
    assert [one.plan and one.plan.tile_count for one in drawn] == [13, 13, 13, 1, 13]
    for one, (_, data) in zip(drawn, pictures, strict=True):
        assert one.error is None
        assert_tiles_are_drawn(sheet, one, data, DYNAMIC)
    # nothing covers anything else, and nothing leaves the sheet
    places = [place for one in drawn for place in (*one.tiles, one.original) if place]
    assert len(places) == 13 * 4 + 1 + 5
    assert not any(overlap(one, other) for one, other in combinations(places, 2))
    assert all(p[0] > 0 and p[1] > 0 and p[2] < sheet.width and p[3] < sheet.height for p in places)


def test_tiles_are_laid_out_as_the_grid() -> None:
    card, drawn = draw_card("four by three", encode(scene(400, 300, 0), "PNG"), DYNAMIC)
    assert card.size == CARD
    assert drawn.plan is not None
    assert (drawn.plan.cols, drawn.plan.rows) == (4, 3)
    rows = [drawn.tiles[start : start + 4] for start in (0, 4, 8)]
    for row in rows:
        assert len({place[1] for place in row}) == 1
        assert all(0 < right[0] - left[2] <= 6 for left, right in pairwise(row))
    for upper, lower in pairwise(rows):
        assert [place[0] for place in upper] == [place[0] for place in lower]
        assert 0 < lower[0][1] - upper[0][3] <= 6
    thumbnail = drawn.tiles[12]
    assert thumbnail[0] > rows[0][3][2]


def test_a_grid_wider_than_its_card_is_still_drawn() -> None:
    wide = Tiling("dynamic", 8, 8, max_tiles=120)
    card, drawn = draw_card("wide", encode(scene(1200, 10, 0), "PNG"), wide)
    assert card.size == CARD
    assert len(drawn.tiles) == 121


def test_grid_is_drawn_over_the_original() -> None:
    flat = encode(Image.new("RGB", (400, 300), "#204060"), "PNG")
    card, drawn = draw_card("flat", flat, DYNAMIC)
    left, top, right, bottom = drawn.original or (0, 0, 0, 0)
    assert (right - left, bottom - top) == (320, 240)
    accent = ImageColor.getrgb(ACCENT)
    for col in range(5):  # lines 80 pixels apart, 40 away from each the picture itself
        assert card.getpixel((left + 80 * col, top + 40)) == accent
    for row in range(4):
        assert card.getpixel((left + 40, top + 80 * row)) == accent
    for col, row in np.ndindex(4, 3):
        middle = (left + 40 + 80 * int(col), top + 40 + 80 * int(row))
        assert card.getpixel(middle) == (0x20, 0x40, 0x60)


def test_what_the_centre_crop_leaves_out_is_dimmed() -> None:
    flat = encode(Image.new("RGB", (400, 200), "#204060"), "PNG")
    card, drawn = draw_card("flat", flat, CENTER)
    assert len(drawn.tiles) == 1
    left, top, right, bottom = drawn.original or (0, 0, 0, 0)
    middle = (top + bottom) // 2
    assert card.getpixel(((left + right) // 2, middle)) == (0x20, 0x40, 0x60)
    for x in (left + 20, right - 20):
        assert min(card.getpixel((x, middle))) > 0xA0


def test_a_reject_is_a_grey_card_with_its_code(tmp_path: Path) -> None:
    whole = (FOLDER / "grey.jpg").read_bytes()
    pictures = [("whole", whole), ("cut", whole[:2000]), ("text", b"not a picture")]
    drawn = draw_contact_sheet(pictures, DYNAMIC, tmp_path / "sheet.png")
    assert drawn[0].error is None
    assert [one.error and one.error.code for one in drawn[1:]] == ["truncated", "unidentified"]
    assert [(one.plan, one.original, one.tiles) for one in drawn[1:]] == [(None, None, ())] * 2
    card, _ = draw_card("cut", whole[:2000], DYNAMIC)
    grey = ImageColor.getrgb(REJECT_FILL)
    assert card.getpixel((CARD[0] // 2, CARD[1] - 2 * MARGIN)) == grey
    other, _ = draw_card("cut", b"not a picture", DYNAMIC)
    assert card.tobytes() != other.tobytes()  # the code is written on it


def test_a_long_name_stays_on_its_card() -> None:
    data = (FOLDER / "grey.jpg").read_bytes()
    card, _ = draw_card("folder/" * 60, data, CENTER)
    title = np.asarray(card)[14:36]
    paper = np.array(ImageColor.getrgb(CARD_FILL))
    assert (title[:, CARD[0] - MARGIN : CARD[0] - 2] == paper).all()
    assert (title[:, CARD[0] - 5 * MARGIN : CARD[0] - MARGIN] != paper).any()


def test_words() -> None:
    def plan(width: int, height: int, tiling: Tiling) -> TilePlan:
        return plan_tiles(width, height, tiling)

    assert caption(plan(400, 300, DYNAMIC)) == "400x300 px  ·  4x3 tiles + thumbnail"
    assert caption(plan(400, 300, CENTER)) == "400x300 px  ·  1 tile"
    no_thumbnail = Tiling("dynamic", 448, 448, 6, thumbnail=False, max_upscale=1.5)
    assert caption(plan(3000, 2000, no_thumbnail)) == "3000x2000 px  ·  3x2 tiles"
    assert describe(no_thumbnail) == (
        "dynamic: up to 6 tiles of 448x448 px, enlarged at most 1.5-fold"
    )
    assert describe(CENTER) == "center-crop: one tile of 112x112 px"


@pytest.mark.parametrize("tiling", [DYNAMIC, CENTER], ids=["dynamic", "center-crop"])
def test_inspect_draws_one_picture_larger_and_returns_its_plan(
    tiling: Tiling, tmp_path: Path
) -> None:
    image, out = FOLDER / "colour-444.jpg", tmp_path / "tiles.png"
    assert inspect_picture(image, out, tiling) == plan_tiles(251, 333, tiling)
    drawn_image = Image.open(out)
    assert drawn_image.size == (2 * CARD[0], 2 * CARD[1])
    card, drawn = draw_card(image.name, image.read_bytes(), tiling, 2)
    assert card.tobytes() == drawn_image.tobytes()
    assert_tiles_are_drawn(drawn_image, drawn, image.read_bytes(), tiling)


def test_inspect_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "tiles.png"
    with pytest.raises(UserError, match=r"cannot read .*none\.jpg \(No such file"):
        inspect_picture(tmp_path / "none.jpg", out, DYNAMIC)
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    with pytest.raises(UserError, match=r"text\.jpg would be a reject \(decode: unidentified: "):
        inspect_picture(text, out, DYNAMIC)
    assert not out.exists()
    with pytest.raises(UserError, match=r"cannot write .*none/tiles\.png \(No such file"):
        inspect_picture(FOLDER / "grey.jpg", tmp_path / "none" / "tiles.png", DYNAMIC)
