"""One picture to its tiles: which grid, and the pixels.

Legend: S tile side in pixels; W×H the resized picture; out is uint8 [tile_count, S, S, 3].

`plan_tiles` needs only width and height, so the tile count of a picture is known before it is
decoded; `cut_tiles` decodes, resizes and writes the tiles where they are to travel from.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from pipeline.pictures import MAX_PIXELS, PictureError, decode_exact, decode_fast, picture_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PictureError", "TilePlan", "Tiling", "cut_tiles", "picture_size", "plan_tiles"]

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tiling:
    """How every picture of a job is tiled.

    `tile_size` is the side of a tile in pixels; `resize_to` the shortest edge in pixels before the
    centre is cut out (center-crop only, at least `tile_size`). `max_tiles`, `thumbnail` and
    `max_upscale` are for dynamic only: a `max_upscale` of u rules out grids that enlarge the
    picture more than u-fold in width or height, None rules out none (the reference).
    """

    mode: Literal["center-crop", "dynamic"]
    tile_size: int
    resize_to: int
    max_tiles: int = 12
    thumbnail: bool = True
    max_upscale: float | None = None
    resize: Literal["exact", "fast"] = "exact"

    def __post_init__(self) -> None:
        if self.mode not in ("center-crop", "dynamic"):
            raise ValueError(f"mode {self.mode!r}: want 'center-crop' or 'dynamic'")
        if self.resize not in ("exact", "fast"):
            raise ValueError(f"resize {self.resize!r}: want 'exact' or 'fast'")
        if self.tile_size < 1 or self.max_tiles < 1:
            raise ValueError(f"tile_size {self.tile_size}, max_tiles {self.max_tiles}: want >= 1")
        if self.mode == "center-crop" and self.resize_to < self.tile_size:
            raise ValueError(f"resize_to {self.resize_to} is below tile_size {self.tile_size}")
        if self.max_upscale is not None and not self.max_upscale > 0:
            raise ValueError(f"max_upscale {self.max_upscale}: want a number above 0, or None")


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one picture, row by row, the thumbnail (the whole picture) last.

    `width` and `height` are the picture's own; `boxes` are in its pixels.
    """

    width: int
    height: int
    cols: int
    rows: int
    boxes: tuple[Box, ...]
    has_thumbnail: bool

    @property
    def tile_count(self) -> int:
        """Tiles to be embedded, the thumbnail among them."""
        return len(self.boxes)


def plan_tiles(width: int, height: int, tiling: Tiling) -> TilePlan:
    """The tiles of a picture of width × height pixels.

    dynamic: the grid of InternVL 1.5's `dynamic_preprocess` with min_num 1 (arXiv 2404.16821,
    section 3.3): the closest aspect ratio, of equally close ones the larger grid if the picture
    has more than half its pixels; a thumbnail when there is more than one tile.
    center-crop: one tile with the sizes and rounding of transformers' `CLIPImageProcessor`.

    Raises PictureError (stage tile, code extreme-aspect) where resizing would take more pixels
    than the largest picture that is accepted, ValueError for a width or height below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels has no tiles")
    side = tiling.tile_size
    if tiling.mode == "center-crop":
        cols, rows, has_thumbnail = 1, 1, False
    else:
        cols, rows = _closest_grid(width, height, tiling)
        has_thumbnail = tiling.thumbnail and cols * rows > 1

    resized_width, resized_height = _resized_size(width, height, cols, rows, tiling)
    # the width-first pass makes a picture of W × height
    if resized_width * max(resized_height, height) > MAX_PIXELS:
        raise PictureError(
            "tile",
            "extreme-aspect",
            f"{width}x{height} pixels would be resized by way of "
            f"{resized_width}x{max(resized_height, height)}",
        )

    left, top = (resized_width - cols * side) // 2, (resized_height - rows * side) // 2
    boxes = [
        (
            (left + col * side) * width / resized_width,
            (top + row * side) * height / resized_height,
            (left + (col + 1) * side) * width / resized_width,
            (top + (row + 1) * side) * height / resized_height,
        )
        for row in range(rows)
        for col in range(cols)
    ]
    if has_thumbnail:
        boxes.append((0.0, 0.0, float(width), float(height)))
    return TilePlan(width, height, cols, rows, tuple(boxes), has_thumbnail)


def cut_tiles(data: bytes, tiling: Tiling, plan: TilePlan, out: "NDArray[np.uint8]") -> None:
    """Decodes the picture and writes its tiles into `out`, uint8 [tile_count, S, S, 3].

    `out` may be a view into a larger array. Raises PictureError (stage decode); then `out` holds
    nothing of use.
    """
    side = tiling.tile_size
    if out.shape != (plan.tile_count, side, side, 3) or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype}{list(out.shape)}, not {plan.tile_count} tiles")
    picture = decode_exact(data) if tiling.resize == "exact" else decode_fast(data)
    size = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    if size != (plan.width, plan.height):
        raise PictureError(
            "decode",
            "size-mismatch",
            f"{size[0]}x{size[1]} pixels decoded, {plan.width}x{plan.height} announced",
        )

    width, height = _resized_size(plan.width, plan.height, plan.cols, plan.rows, tiling)
    left, top = (width - plan.cols * side) // 2, (height - plan.rows * side) // 2
    box = (left, top, left + plan.cols * side, top + plan.rows * side)
    pixels = _resize(picture, width, height, box)  # [rows · S, cols · S, 3]
    grid = pixels.reshape(plan.rows, side, plan.cols, side, 3).transpose(0, 2, 1, 3, 4)
    num_grid = plan.rows * plan.cols
    # one strided copy for the whole grid; splitting the first axis of `out` is always a view
    out[:num_grid].reshape(plan.rows, plan.cols, side, side, 3)[...] = grid
    if plan.has_thumbnail:
        out[num_grid] = _resize(picture, side, side, (0, 0, side, side))


def _closest_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Columns and rows by InternVL 1.5's `find_closest_aspect_ratio`."""
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for cols, rows in _grids(tiling.max_tiles):
        upscale = max(cols * tiling.tile_size / width, rows * tiling.tile_size / height)
        if tiling.max_upscale is not None and upscale > tiling.max_upscale:
            continue  # never leaves less than 1×1, which is what `best` starts from
        difference = abs(aspect - cols / rows)
        if difference < best_difference:
            best, best_difference = (cols, rows), difference
        elif difference == best_difference:
            grid_pixels = tiling.tile_size * tiling.tile_size * cols * rows
            if width * height > 0.5 * grid_pixels:
                best = (cols, rows)
    return best


@lru_cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) of at most `max_tiles` tiles, few tiles first.

    The reference sorts a set by tiles alone. What order it leaves among grids of as many tiles
    never matters: two of them are never both closest, as there is always a grid between them.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def _resized_size(width: int, height: int, cols: int, rows: int, tiling: Tiling) -> tuple[int, int]:
    """W, H of the resized picture that the grid is cut from."""
    if tiling.mode == "dynamic":
        return cols * tiling.tile_size, rows * tiling.tile_size
    # transformers' get_resize_output_image_size: the longer edge is rounded down
    short, long = min(width, height), max(width, height)
    resized_long = int(tiling.resize_to * long / short)
    return (tiling.resize_to, resized_long) if width <= height else (resized_long, tiling.resize_to)


def _resize(
    picture: "Image.Image | NDArray[np.uint8]",
    width: int,
    height: int,
    box: tuple[int, int, int, int],
) -> "NDArray[np.uint8]":
    """What lies in `box` (left, top, right, bottom) of the picture resized to width × height.

    uint8 [bottom - top, right - left, 3].
    """
    if isinstance(picture, Image.Image):
        # Two passes, width first: what Pillow up to 12 does in one call, and the checkpoints were
        # trained with. Pillow 13 takes the height first where that is less work, up to 13 of 255
        # away; one pass a call gives the same bytes with both.
        bicubic = Image.Resampling.BICUBIC
        wide = picture.resize((width, picture.height), bicubic)
        whole = wide.resize((width, height), bicubic)
        # A long picture's crop is cut out before numpy copies it: a GiB less.
        return np.asarray(whole if box == (0, 0, width, height) else whole.crop(box))

    import torch

    # [1, 3, h, w] with channels-last strides: as torch's own copy it takes three times as long
    pixels = torch.from_numpy(picture).unsqueeze(0).permute(0, 3, 1, 2)
    try:
        resized = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode="bicubic", antialias=True
        )
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch has no type of its own for it
            raise MemoryError(str(error)) from error
        raise
    left, top, right, bottom = box
    array: NDArray[np.uint8] = resized.permute(0, 2, 3, 1)[0].numpy()
    return array[top:bottom, left:right]
