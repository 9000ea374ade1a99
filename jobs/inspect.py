"""`tessera inspect IMAGE`: how one picture is tiled, as a picture."""

from pathlib import Path

from jobs.contact_sheet import draw_card
from model.errors import UserError
from pipeline.tiling import TilePlan, Tiling

SCALE = 2  # 1600 pixels wide


def inspect_picture(image: Path, out: Path, tiling: Tiling) -> TilePlan:
    """Draws the tiling of `image` into the PNG `out` and returns the plan that it shows.

    Raises UserError for a file that cannot be read or written, and for one that would be a reject.
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {image} ({error.strerror}): give the path of a picture"
        ) from error
    card, drawn = draw_card(image.name, data, tiling, SCALE)
    if drawn.plan is None:
        raise UserError(
            f"{image} would be a reject ({drawn.error}): give a picture that can be decoded"
        ) from drawn.error
    try:
        card.save(out, "PNG")
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror}): give a path in a folder that exists"
        ) from error
    return drawn.plan
