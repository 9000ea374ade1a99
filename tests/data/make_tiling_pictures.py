"""Makes tests/data/tiling: one small encoded file for each kind of picture, and golden.json.

    python -m tests.data.make_tiling_pictures            # golden.json for the files that are there
    python -m tests.data.make_tiling_pictures --encode   # the files too

The files are kept rather than made anew for each test: another encoder version writes other bytes.
Needs numpy and Pillow only.
"""

import hashlib
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.tiling import Tiling, cut_tiles, picture_size, plan_tiles

FOLDER = Path(__file__).parent / "tiling"

TILINGS = {
    "center-crop": Tiling("center-crop", tile_size=448, resize_to=448),
    "dynamic": Tiling("dynamic", tile_size=448, resize_to=448),
}


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Soft colours with hard edges on top: what tells filters, passes and roundings apart."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(soft.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(6):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        pixels[top : top + height // 6 + 1, left : left + width // 8 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_rgb16(picture: Image.Image) -> bytes:
    """A PNG of three 16-bit channels, which Pillow reads but does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    pixels = np.asarray(picture).astype(">u2") * 257 - 100 * (np.asarray(picture) > 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", *picture.size, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encode_all() -> dict[str, bytes]:
    """File name to bytes."""
    alpha = scene(110, 80, 1).convert("L")
    rgba = scene(110, 80, 2)
    rgba.putalpha(alpha)
    grey16 = Image.fromarray(np.asarray(scene(90, 70, 3).convert("L")).astype(np.uint16) * 5)
    palette = scene(180, 120, 4).quantize(32)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn right by 90 degrees to view
    frames = [scene(90, 60, seed).quantize(16) for seed in (5, 6)]
    return {
        "grey.jpg": encode(scene(301, 200, 10).convert("L"), "JPEG", quality=80),
        "colour-420.jpg": encode(scene(333, 251, 11), "JPEG", quality=80, subsampling=2),
        "colour-444.jpg": encode(scene(251, 333, 12), "JPEG", quality=80, subsampling=0),
        "progressive.jpg": encode(scene(400, 300, 13), "JPEG", quality=70, progressive=True),
        "cmyk.jpg": encode(scene(160, 120, 14).convert("CMYK"), "JPEG", quality=70),
        "exif-rotated.jpg": encode(scene(320, 200, 15), "JPEG", quality=70, exif=rotated),
        "wide-2000x90.jpg": encode(scene(2000, 90, 16), "JPEG", quality=50),
        "tall-60x1500.jpg": encode(scene(60, 1500, 17), "JPEG", quality=60),
        "one-pixel.png": encode(scene(1, 1, 18), "PNG"),
        "grey-alpha.png": encode(rgba.convert("LA"), "PNG"),
        "rgba.png": encode(rgba, "PNG"),
        "palette.png": encode(palette, "PNG", optimize=True),
        "palette-transparent.png": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "grey-16-bit.png": encode(grey16, "PNG"),
        "colour-16-bit.png": png_rgb16(scene(48, 36, 19)),
        "bilevel.png": encode(scene(333, 200, 20).convert("1"), "PNG"),
        "lossy.webp": encode(scene(320, 240, 21), "WEBP", quality=60),
        "lossless-alpha.webp": encode(rgba, "WEBP", lossless=True),
        "colour.bmp": encode(scene(61, 41, 22), "BMP"),
        "colour.tif": encode(scene(60, 40, 23), "TIFF", compression="tiff_lzw"),
        "lossless.avif": encode(scene(64, 48, 24), "AVIF", quality=100, subsampling="4:4:4"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def tiles_sha256(data: bytes, tiling: Tiling) -> str:
    plan = plan_tiles(*picture_size(data), tiling)
    out = np.zeros((plan.tile_count, tiling.tile_size, tiling.tile_size, 3), np.uint8)
    cut_tiles(data, tiling, plan, out)
    return hashlib.sha256(out.tobytes()).hexdigest()


def main() -> None:
    if "--encode" in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for name, data in encode_all().items():
            (FOLDER / name).write_bytes(data)
    files = sorted(path for path in FOLDER.iterdir() if path.name != "golden.json")
    golden = {
        path.name: {
            mode: tiles_sha256(path.read_bytes(), tiling) for mode, tiling in TILINGS.items()
        }
        for path in files
    }
    (FOLDER / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
