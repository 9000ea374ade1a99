"""Bad pictures: odd ones with what must come of each, and mutations of sound ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tests.data.make_tiling_pictures import FOLDER, encode, scene

SIDE_LIMIT = 65_535


@cache
def sound() -> dict[str, bytes]:
    """Small pictures in every format and mode that is read, by name."""
    found = {
        path.name: path.read_bytes()
        for path in sorted(FOLDER.iterdir())
        if path.suffix != ".json" and path.stat().st_size < 40_000
    }
    rgb = scene(48, 40, 1)

    def several() -> dict[str, object]:
        return {"save_all": True, "append_images": [scene(48, 40, seed) for seed in range(3)]}

    palette = rgb.quantize(32)
    made: dict[str, bytes] = {
        "mpo": encode(rgb, "MPO", **several()),
        "icc.jpg": encode(rgb, "JPEG", icc_profile=bytes(3000), exif=_exif()),
        "restart.jpg": encode(rgb, "JPEG", restart_marker_blocks=1),
        "arithmetic-like.jpg": encode(rgb, "JPEG", progressive=True, optimize=True),
        "animated.png": encode(rgb, "PNG", **several()),
        "text.png": encode(rgb, "PNG", icc_profile=bytes(500), exif=_exif()),
        "rgba-16.png": _png16(rgb),
        "animated.webp": encode(rgb, "WEBP", **several()),
        "icc.webp": encode(rgb, "WEBP", icc_profile=bytes(500), exif=_exif()),
        "frames.gif": encode(palette, "GIF", **several(), interlace=1),
        "frames.tif": encode(rgb, "TIFF", **several()),
        "lzw.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "packbits.tif": encode(palette, "TIFF", compression="packbits"),
        "jpeg.tif": encode(rgb, "TIFF", compression="jpeg"),
        "group4.tif": encode(rgb.convert("1"), "TIFF", compression="group4"),
        "16-bit.tif": encode(
            Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "TIFF"
        ),
        "float.tif": encode(rgb.convert("F"), "TIFF"),
        "cmyk.tif": encode(rgb.convert("CMYK"), "TIFF"),
        "palette.bmp": encode(palette, "BMP"),
        "rle.bmp": _bmp_rle(b"\x04\x07\x00\x00" * 8 + b"\x00\x01"),
        "animated.avif": encode(rgb, "AVIF", **several()),
        "alpha.avif": encode(rgb.convert("RGBA"), "AVIF"),
        "plain.ppm": b"P3 2 2 255\n" + b"1 2 3 " * 4,
        "16-bit.pgm": b"P5 4 4 65535\n" + bytes(range(32)),
        "bitmap.pbm": b"P4 16 4\n" + bytes(range(8)),
        "float.pfm": b"Pf 2 2 -1.0\n" + bytes(16),
        "raw.ppm": encode(rgb, "PPM"),
    }
    return {**found, **made}


def _exif() -> bytes:
    exif = Image.Exif()
    exif[274], exif[305] = 6, "tessera" * 20
    return exif.tobytes()


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with this header, whatever chunks follow, and black pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    line = bytes(1 + width * channels * depth // 8)
    pixels = zlib.compress(line * height, 1)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png16(picture: Image.Image) -> bytes:
    return png(*picture.size, depth=16, colour=6)


def _bmp_rle(codes: bytes, width: int = 8, height: int = 8) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + codes


def _claims(name: str, find: bytes, skip: int, sides: bytes) -> bytes:
    """A sound picture whose header gives another size."""
    data = bytearray(sound()[name])
    at = data.index(find) + skip
    data[at : at + len(sides)] = sides
    return bytes(data)


def webp_canvas(side: int) -> bytes:
    """An animated WebP of one small frame on a canvas of side × side."""
    frame = encode(Image.new("RGB", (32, 32)), "WEBP")[12:]
    place = bytes(6) + (31).to_bytes(3, "little") * 2 + b"\x64\0\0\0"
    canvas = b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    parts = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", place + frame)]
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(frames: int) -> bytes:
    one = encode(Image.new("P", (8, 8)), "GIF")
    start = one.index(b",")
    return one[:start] + one[start:-1] * frames + b";"


def _tiff_loop() -> bytes:
    """A TIFF whose directory is followed by itself."""
    data = bytearray(encode(Image.new("RGB", (32, 32)), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    return bytes(data)


def _segments(marker: bytes, payload: bytes, count: int) -> bytes:
    """A JPEG with many application segments in front."""
    data = encode(scene(32, 32, 2), "JPEG")
    segment = b"\xff" + marker + struct.pack(">H", len(payload) + 2) + payload
    return data[:2] + segment * count + data[2:]


def inverted_cmyk(picture: Image.Image) -> bytes:
    """A CMYK JPEG with Adobe's marker, whose values such programs write inverted."""
    return encode(picture.convert("CMYK"), "JPEG", quality=95)


@dataclass(frozen=True)
class Odd:
    """`code` is the reject's; None for a picture that is embedded. `size` is what it decodes to."""

    build: Callable[[], bytes]
    code: str | None = None
    size: tuple[int, int] | None = None


BOMB = "decode/decompression-bomb"
UNDECODABLE = "decode/decode-error"
ODD: dict[str, Odd] = {
    "1x65535": Odd(lambda: png(1, SIDE_LIMIT), size=(1, SIDE_LIMIT)),
    "65535x1": Odd(lambda: png(SIDE_LIMIT, 1), size=(SIDE_LIMIT, 1)),
    "1x65500.jpg": Odd(lambda: encode(Image.new("RGB", (1, 65_500)), "JPEG"), size=(1, 65_500)),
    "1x1": Odd(lambda: png(1, 1), size=(1, 1)),
    "16-bit": Odd(lambda: png(20, 10, depth=16), size=(20, 10)),
    "16-bit-rgba": Odd(lambda: png(20, 10, depth=16, colour=6), size=(20, 10)),
    "cmyk-adobe": Odd(lambda: inverted_cmyk(scene(40, 30, 3)), size=(40, 30)),
    "animated.gif": Odd(lambda: _gif(3), size=(8, 8)),
    "gif-100000-frames": Odd(lambda: _gif(100_000), size=(8, 8)),
    "tiff-directory-loop": Odd(_tiff_loop, size=(32, 32)),
    "png-text-bomb": Odd(
        lambda: png(8, 8, *[png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20)))] * 4),
        UNDECODABLE,
    ),
    "png-icc-bomb": Odd(
        lambda: png(8, 8, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
        UNDECODABLE,
    ),
    "png-100000-chunks": Odd(lambda: png(8, 8, *[png_chunk(b"abCd", b"")] * 100_000), size=(8, 8)),
    "png-pixel-bomb": Odd(
        lambda: png(8, 8)[:33] + png_chunk(b"IDAT", zlib.compress(bytes(64 << 20))), size=(8, 8)
    ),
    "jpeg-icc-segments": Odd(
        lambda: _segments(b"\xe2", b"ICC_PROFILE\0\1\xff" + bytes(1000), 2000), size=(32, 32)
    ),
    "jpeg-exif-segments": Odd(
        lambda: _segments(b"\xe1", b"Exif\0\0" + bytes(1000), 500), size=(32, 32)
    ),
    "jpeg-comments": Odd(lambda: _segments(b"\xfe", b"", 100_000), size=(32, 32)),
    "png-million-chunks": Odd(lambda: png(8, 8, png_chunk(b"abCd", b"") * 1_000_000), UNDECODABLE),
    "jpeg-exif-without-end": Odd(  # each joined to all before it: minutes
        lambda: _segments(b"\xe1", b"Exif\0\0" + bytes(65_000), 1000), UNDECODABLE
    ),
    "jpeg-comments-without-end": Odd(lambda: _segments(b"\xfe", b"", 1_000_000), UNDECODABLE),
    "ppm-comment": Odd(lambda: b"P6 #" + b"x" * 60_000 + b"\n1 1 255\nabc", size=(1, 1)),
    "ppm-long-comment": Odd(lambda: b"P6 #" + b"x" * (16 << 20) + b"\n1 1 255\nabc", UNDECODABLE),
    "bmp-rle-ends-early": Odd(lambda: _bmp_rle(b"\0\1", 2000, 2000), UNDECODABLE),
    "bmp-rle-line-ends": Odd(lambda: _bmp_rle(b"\0\0" * 100_000, 200, 200), UNDECODABLE),
    "bomb.png": Odd(lambda: png_header(0x7FFFFFFF, 0x7FFFFFFF), BOMB),
    "bomb.webp": Odd(lambda: webp_canvas(16_383), BOMB),
    "bomb-24-bit.webp": Odd(lambda: webp_canvas(1 << 16), BOMB),
    "bomb.gif": Odd(lambda: _claims("frames.gif", b"GIF8", 6, b"\xff" * 4), BOMB),
    "bomb.bmp": Odd(lambda: _claims("palette.bmp", b"BM", 18, b"\xff\xff\xff\x7f" * 2), BOMB),
    "bomb.ppm": Odd(lambda: b"P6 2147483647 2147483647 255\n", BOMB),
    "bomb.avif": Odd(
        lambda: _claims("alpha.avif", b"ispe", 8, struct.pack(">II", 16_384, 16_384)), BOMB
    ),
    "bomb.jpg": Odd(lambda: _claims("restart.jpg", b"\xff\xc0", 5, b"\xff\xdc" * 2), BOMB),
    # MemoryError in Pillow's decoders and in its resize, which ended the whole job
    "wide.png": Odd(lambda: png_header((1 << 27) + 1, 1), BOMB),
    "tall.png": Odd(lambda: png_header(1, (1 << 26) + 1), BOMB),
    "text-as-picture": Odd(lambda: b"hello", "decode/unidentified"),
    "svg": Odd(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "decode/unidentified"),
    "postscript": Odd(lambda: encode(scene(9, 9, 0), "EPS"), "decode/unidentified"),
}


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would begin."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + struct.pack(">I", 9) + b"IDAT"


INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to six changes, most of them near the front, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if len(changed) < 8:
            break
        reach = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        at = rng.randrange(reach)
        length = rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice(INTERESTING)
        elif kind == 2:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            changed[at : at + length] = bytes([rng.choice(INTERESTING)]) * length
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 6:
            del changed[rng.randrange(len(changed)) :]
        else:
            other = rng.choice(list(sound().values()))
            start = rng.randrange(len(other))
            changed[at : at + length] = other[start : start + length]
    return bytes(changed)


def mended_png(data: bytes) -> bytes:
    """The checksums of a PNG's chunks made right again, so that what is behind them is reached."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def case(seed: int, number: int) -> tuple[str, bytes]:
    """The name of the sound picture and its mutation; the same for the same seed and number."""
    rng = random.Random(f"{seed}-{number}")
    name = rng.choice(sorted(sound()))
    data = mutated(sound()[name], rng)
    if data.startswith(b"\x89PNG\r\n\x1a\n") and rng.random() < 0.7:
        data = mended_png(data)
    return name, data


def pixels(data: bytes) -> bytes:
    """What plain Pillow makes of it."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB").tobytes()
