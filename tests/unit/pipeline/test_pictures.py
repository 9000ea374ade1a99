"""Which bytes are pictures: accepted formats, every reject code, the same set exact and fast."""

import io
import pickle
import random
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures import FORMATS, MAX_PIXELS, MAX_SIDE, decode_exact, decode_fast
from pipeline.tiling import PictureError, Tiling, cut_tiles, picture_size, plan_tiles
from tests.data.make_tiling_pictures import FOLDER, encode, scene

MODES = ("exact", "fast")


def reject(data: bytes, resize: str = "exact") -> tuple[str, str]:
    """Stage and code of the error that tiling `data` ends in."""
    tiling = Tiling("dynamic", 56, 56, max_tiles=2, resize=resize)
    with pytest.raises(PictureError) as caught:  # noqa: PT012 - either step may find it
        plan = plan_tiles(*picture_size(data), tiling)
        cut_tiles(data, tiling, plan, np.zeros((plan.tile_count, 56, 56, 3), np.uint8))
    assert "\n" not in str(caught.value)
    return caught.value.stage, caught.value.code


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_accepted_formats_are_read(kind: str) -> None:
    picture = scene(40, 30, 0)
    options = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    data = encode(picture, kind, **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == kind
    assert picture_size(data) == (40, 30)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_exact(data)), expected)
    np.testing.assert_array_equal(decode_fast(data), expected)


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("data", [b"", b"\xff", b"not a picture " * 40, b"\x89PNG\r\n\x1a\n"])
def test_unidentified(data: bytes, resize: str) -> None:
    assert reject(data, resize) == ("decode", "unidentified")


@pytest.mark.parametrize("kind", ["TGA", "EPS", "ICO", "PCX", "DDS"])
def test_formats_off_the_list_are_unidentified(kind: str) -> None:
    data = encode(scene(32, 32, 0), kind)
    Image.open(io.BytesIO(data)).close()  # Pillow alone would read it
    assert reject(data) == ("decode", "unidentified")


def test_zero_size() -> None:
    assert reject(png_header(0, 7)) == ("decode", "zero-size")
    assert reject(png_header(7, 0)) == ("decode", "zero-size")
    bmp = bytearray(encode(scene(30, 20, 0), "BMP"))
    assert struct.unpack_from("<II", bmp, 18) == (30, 20)
    struct.pack_into("<I", bmp, 18, 0)
    assert reject(bytes(bmp)) == ("decode", "zero-size")
    jpeg = bytearray(encode(scene(30, 20, 0), "JPEG"))
    height_at = jpeg.index(b"\xff\xc0") + 5
    assert struct.unpack_from(">HH", jpeg, height_at) == (20, 30)
    struct.pack_into(">H", jpeg, height_at, 0)
    assert reject(bytes(jpeg)) == ("decode", "zero-size")


def test_decompression_bomb_from_the_header_alone() -> None:
    assert MAX_PIXELS == 2 * 89_478_485 == 178_956_970  # 11 · 16 268 815 and 5
    assert picture_size(png_header(11, 16_268_815)) == (11, 16_268_815)
    assert reject(png_header(11, 16_268_816)) == ("decode", "decompression-bomb")
    assert picture_size(png_header(1, MAX_SIDE)) == (1, MAX_SIDE)
    assert reject(png_header(1, MAX_SIDE + 1)) == ("decode", "decompression-bomb")
    # also where Pillow's own limit has been taken away
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):
        assert reject(png_header(11, 16_268_816)) == ("decode", "decompression-bomb")


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize(
    "name",
    ["grey.jpg", "colour-420.jpg", "progressive.jpg", "cmyk.jpg", "rgba.png", "grey-16-bit.png"],
)
def test_truncated(name: str, resize: str) -> None:
    data = (FOLDER / name).read_bytes()
    decode_exact(data)
    assert reject(data[: len(data) * 2 // 3], resize) == ("decode", "truncated")


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("name", ["lossy.webp", "lossless.avif", "colour.bmp", "colour.tif"])
def test_cut_short_in_other_formats(name: str, resize: str) -> None:
    data = (FOLDER / name).read_bytes()
    stage, code = reject(data[: len(data) // 2], resize)
    assert stage == "decode"
    assert code in ("truncated", "decode-error", "unidentified")


@pytest.mark.parametrize("resize", MODES)
def test_decode_error(resize: str) -> None:
    data = bytearray(encode(scene(90, 60, 0), "PNG"))
    data[data.index(b"IDAT") + 4 :][:2] = b"\0\0"
    data[data.index(b"IDAT") + 4] = 0  # not a zlib stream
    assert reject(bytes(data), resize) == ("decode", "decode-error")


@pytest.mark.parametrize("resize", MODES)
def test_size_mismatch(resize: str) -> None:
    data = (FOLDER / "grey.jpg").read_bytes()
    tiling = Tiling("center-crop", 56, 56, resize=resize)
    plan = plan_tiles(200, 301, tiling)  # it is 301×200
    with pytest.raises(PictureError, match="301x200 pixels decoded, 200x301 announced") as caught:
        cut_tiles(data, tiling, plan, np.zeros((1, 56, 56, 3), np.uint8))
    assert (caught.value.stage, caught.value.code) == ("decode", "size-mismatch")


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PictureError("decode", "truncated", "3 bytes missing")))
    assert (error.stage, error.code, error.message) == ("decode", "truncated", "3 bytes missing")
    assert str(error) == "decode: truncated: 3 bytes missing"


def test_running_out_of_memory_is_no_fault_of_the_picture() -> None:
    data = (FOLDER / "grey.jpg").read_bytes()
    with (
        mock.patch.object(Image.Image, "convert", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        decode_exact(data)


def decoded(decode: object, data: bytes) -> tuple[str, bytes]:
    try:
        return "accepted", np.asarray(decode(data)).tobytes()
    except PictureError as error:
        return "rejected", error.code.encode()


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 2},
        {"subsampling": 0},
        {"progressive": True},
        {"restart_marker_blocks": 4},
        {"keep_rgb": True},
        {"grey": True},
    ],
    ids=str,
)
def test_fast_accepts_the_jpegs_that_exact_accepts(options: dict[str, object]) -> None:
    options = dict(options)
    picture = scene(96, 64, 3)
    whole = encode(
        picture.convert("L") if options.pop("grey", False) else picture, "JPEG", **options
    )
    damaged = [whole[:length] for length in range(0, len(whole), 61)]
    damaged += [whole[:-length] for length in range(1, 12)]
    rng = random.Random(str(options))
    for _ in range(150):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            flipped[rng.randrange(2, len(flipped))] = rng.randrange(256)
        damaged.append(bytes(flipped))
    fates = [decoded(decode_exact, data) for data in damaged]
    assert [decoded(decode_fast, data) for data in damaged] == fates
    assert {fate for fate, _ in fates} == {"accepted", "rejected"}
    assert decoded(decode_fast, whole)[0] == "accepted"
