"""Pictures of how pictures are tiled: a sheet for many, a card for one.

A card shows the original with its tile grid drawn over it beside the tiles, laid out as the grid,
and the thumbnail. Lengths are pixels at scale 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures import decode_exact
from pipeline.tiling import PictureError, TilePlan, Tiling, cut_tiles, picture_size, plan_tiles

Rect = tuple[int, int, int, int]  # left, top, right, bottom

CARD = (800, 328)
MARGIN = 20
CAPTION_HEIGHT = 64
ORIGINAL = (330, 240)  # what the original is fitted into
THUMBNAIL = 100
GAP = 4  # between tiles
COLUMNS = 2
HEADER_HEIGHT = 92

PAPER, CARD_FILL, EDGE = "#eef0f3", "#ffffff", "#d5d9df"
INK, FAINT_INK, ACCENT, REJECT_FILL = "#1d2430", "#667081", "#e4572e", "#c9cdd4"


@dataclass(frozen=True)
class DrawnPicture:
    """Where one picture was drawn, in pixels of the finished image.

    A reject has an `error`, and neither plan nor places.
    """

    name: str
    plan: TilePlan | None = None
    error: PictureError | None = None
    original: Rect | None = None
    tiles: tuple[Rect, ...] = ()  # as in the plan: the thumbnail last


def draw_contact_sheet(
    pictures: Sequence[tuple[str, bytes]], tiling: Tiling, path: Path
) -> list[DrawnPicture]:
    """Writes a PNG with a card for each (name, encoded picture), two in a row.

    A picture that cannot be tiled gets a grey card with its reject code.
    """
    cards = [draw_card(name, data, tiling) for name, data in pictures]
    num_rows = math.ceil(len(cards) / COLUMNS)
    width = COLUMNS * (CARD[0] + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, HEADER_HEIGHT + num_rows * (CARD[1] + MARGIN)), PAPER)

    num_tiles = sum(drawn.plan.tile_count for _, drawn in cards if drawn.plan)
    num_rejects = sum(drawn.error is not None for _, drawn in cards)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, 18), "How the pictures are tiled", 28, INK)
    counts = ", ".join(
        _count(*pair)
        for pair in ((len(cards), "picture"), (num_tiles, "tile"), (num_rejects, "reject"))
    )
    _write(pen, (MARGIN, 54), f"{describe(tiling)}  ·  {counts}", 17, FAINT_INK)

    placed = []
    for index, (card, drawn) in enumerate(cards):
        row, column = divmod(index, COLUMNS)
        left = MARGIN + column * (CARD[0] + MARGIN)
        top = HEADER_HEIGHT + row * (CARD[1] + MARGIN)
        sheet.paste(card, (left, top))
        placed.append(_moved(drawn, left, top))
    sheet.save(path, "PNG")
    return placed


def draw_card(
    name: str, data: bytes, tiling: Tiling, scale: int = 1
) -> tuple[Image.Image, DrawnPicture]:
    """One picture's card, CARD × scale pixels, and where on it things are."""
    card = Image.new("RGB", (CARD[0] * scale, CARD[1] * scale), PAPER)
    pen = ImageDraw.Draw(card)
    frame = (0, 0, card.width - 1, card.height - 1)
    pen.rounded_rectangle(frame, 12 * scale, fill=CARD_FILL, outline=EDGE, width=scale)
    try:
        plan = plan_tiles(*picture_size(data), tiling)
        tiles = np.empty((plan.tile_count, tiling.tile_size, tiling.tile_size, 3), np.uint8)
        cut_tiles(data, tiling, plan, tiles)
    except PictureError as error:
        _draw_reject(pen, name, error, scale)
        return card, DrawnPicture(name, error=error)

    room = CARD[0] - 2 * MARGIN
    title, subtitle = (MARGIN * scale, 14 * scale), (MARGIN * scale, 39 * scale)
    _write(pen, title, name, 20 * scale, INK, room * scale)
    _write(pen, subtitle, caption(plan), 15 * scale, FAINT_INK, room * scale)

    original = _draw_original(card, decode_exact(data), plan, scale)
    places = _tile_places(plan, scale)
    for tile, place in zip(tiles, places, strict=True):
        size = (place[2] - place[0], place[3] - place[1])
        card.paste(Image.fromarray(tile).resize(size, Image.Resampling.LANCZOS), place[:2])
    if plan.has_thumbnail:
        left, top, right, bottom = places[-1]
        around = (left - 2 * scale, top - 2 * scale, right + 2 * scale - 1, bottom + 2 * scale - 1)
        pen.rectangle(around, outline=ACCENT, width=2 * scale)
        _write(pen, (left, bottom + 5 * scale), "thumbnail", 13 * scale, FAINT_INK)
    return card, DrawnPicture(name, plan=plan, original=original, tiles=tuple(places))


def caption(plan: TilePlan) -> str:
    """For instance `600x400 px  ·  3x2 tiles + thumbnail` (the font has no multiplication sign)."""
    grid = "1 tile" if plan.cols * plan.rows == 1 else f"{plan.cols}x{plan.rows} tiles"
    thumbnail = " + thumbnail" if plan.has_thumbnail else ""
    return f"{plan.width}x{plan.height} px  ·  {grid}{thumbnail}"


def describe(tiling: Tiling) -> str:
    """The tiling in words."""
    size = f"{tiling.tile_size}x{tiling.tile_size} px"
    if tiling.mode == "center-crop":
        return f"center-crop: one tile of {size}"
    upscale = (
        "" if tiling.max_upscale is None else f", enlarged at most {tiling.max_upscale:g}-fold"
    )
    return f"dynamic: up to {_count(tiling.max_tiles, 'tile')} of {size}{upscale}"


def _draw_original(card: Image.Image, picture: Image.Image, plan: TilePlan, scale: int) -> Rect:
    """The picture, what no tile covers dimmed, and the outline of each tile."""
    fit = min(ORIGINAL[0] * scale / plan.width, ORIGINAL[1] * scale / plan.height)
    size = (max(1, round(plan.width * fit)), max(1, round(plan.height * fit)))
    left = MARGIN * scale
    top = CAPTION_HEIGHT * scale + (ORIGINAL[1] * scale - size[1]) // 2

    shown = picture.resize(size, Image.Resampling.LANCZOS)
    dimmed = Image.blend(shown, Image.new("RGB", size, "#ffffff"), 0.65)
    grid = plan.boxes[: plan.cols * plan.rows]
    outlines = [
        (
            round(box[0] * size[0] / plan.width),
            round(box[1] * size[1] / plan.height),
            round(box[2] * size[0] / plan.width),
            round(box[3] * size[1] / plan.height),
        )
        for box in grid
    ]
    for outline in outlines:
        dimmed.paste(shown.crop(outline), outline[:2])
    card.paste(dimmed, (left, top))

    pen = ImageDraw.Draw(card)
    # a bright line below a narrower one in colour is seen on any picture; both lie on the edges
    for colour, half in (("#ffffff", 2 * scale), (ACCENT, scale)):
        for outline in outlines:
            rect = (
                left + outline[0] - half,
                top + outline[1] - half,
                left + outline[2] + half - 1,
                top + outline[3] + half - 1,
            )
            pen.rectangle(rect, outline=colour, width=2 * half)
    return left, top, left + size[0], top + size[1]


def _tile_places(plan: TilePlan, scale: int) -> list[Rect]:
    """Where the tiles go, right of the original: the grid, beside it or below it the thumbnail."""
    area_left = (MARGIN + ORIGINAL[0] + 2 * MARGIN) * scale
    area_width = (CARD[0] - MARGIN) * scale - area_left
    area_height = ORIGINAL[1] * scale
    gap, apart, thumbnail = GAP * scale, MARGIN * scale, THUMBNAIL * scale
    below = plan.cols > 2 * plan.rows  # a wide grid leaves room there
    reserved = thumbnail + apart if plan.has_thumbnail else 0
    grid_width = area_width - (0 if below else reserved)
    grid_height = area_height - (reserved + apart if below else 0)
    side = min(
        (grid_width - gap * (plan.cols - 1)) // plan.cols,
        (grid_height - gap * (plan.rows - 1)) // plan.rows,
    )
    side = max(side, 1)  # a grid of eighty columns and more runs off the card
    drawn_width = plan.cols * (side + gap) - gap
    drawn_height = plan.rows * (side + gap) - gap + (reserved if below else 0)
    area_top = CAPTION_HEIGHT * scale + (area_height - drawn_height) // 2

    corners = [
        (area_left + col * (side + gap), area_top + row * (side + gap))
        for row in range(plan.rows)
        for col in range(plan.cols)
    ]
    places = [(left, top, left + side, top + side) for left, top in corners]
    if plan.has_thumbnail:
        left = area_left if below else area_left + drawn_width + apart
        top = area_top + drawn_height - thumbnail if below else area_top
        places.append((left, top, left + thumbnail, top + thumbnail))
    return places


def _draw_reject(pen: ImageDraw.ImageDraw, name: str, error: PictureError, scale: int) -> None:
    inset = MARGIN * scale
    right, bottom = CARD[0] * scale - inset, CARD[1] * scale - inset
    area = (inset, CAPTION_HEIGHT * scale, right, bottom)
    room = right - inset
    _write(pen, (inset, 14 * scale), name, 20 * scale, INK, room)
    _write(pen, (inset, 39 * scale), f"reject, stage {error.stage}", 15 * scale, FAINT_INK)
    pen.rounded_rectangle(area, 8 * scale, fill=REJECT_FILL)
    middle = (area[1] + area[3]) // 2
    _write(pen, (inset * 2, middle - 34 * scale), error.code, 30 * scale, INK, room - 2 * inset)
    below = (inset * 2, middle + 10 * scale)
    _write(pen, below, error.message, 15 * scale, FAINT_INK, room - 2 * inset)


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    room: int | None = None,
) -> None:
    """One line of text, its end replaced by three dots where it is wider than `room` pixels."""
    font = ImageFont.load_default(size)
    if room is not None and font.getlength(text) > room:
        while text and font.getlength(text + "...") > room:
            text = text[:-1]
        text += "..."
    pen.text(corner, text, fill=colour, font=font)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _moved(drawn: DrawnPicture, right: int, down: int) -> DrawnPicture:
    def move(rect: Rect) -> Rect:
        return rect[0] + right, rect[1] + down, rect[2] + right, rect[3] + down

    original = drawn.original and move(drawn.original)
    return replace(drawn, original=original, tiles=tuple(move(rect) for rect in drawn.tiles))
