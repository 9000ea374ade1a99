"""Encoded pictures: what is accepted, how big it is, and its pixels.

Pixels are those of `Image.open(...).convert("RGB")`, as InternVL's own `load_image` and the model
cards have it: alpha is dropped, not composited (transformers 5's processors composite on white when
they are handed a transparent picture; the cards convert before), a 16-bit grey picture is clipped
at 255, the first frame of an animation counts, and EXIF orientation is not applied.
"""

import io
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

# Pillow reads some fifty formats, a few of them by way of other programs (EPS starts Ghostscript)
# or in code that few people run. Shards come from the open web, so only what picture members are
# made of is let in. "JPEG" opens the phones' multi-picture files (MPO) too.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")

# Above this Pillow itself refuses to open a picture: 2 × `Image.MAX_IMAGE_PIXELS`. It stands here
# as a number so that what is accepted does not depend on a setting some other library changed.
MAX_PIXELS = 2 * 89_478_485
# Pillow's decoders and its `resize` raise MemoryError from a side of some 2**26 pixels on, where an
# int cannot count bits or coefficients any more; these take 32 bytes for each pixel of the side.
MAX_SIDE = 1 << 24
STRIP_ROWS = 1024

# Some headers may go on as long as the file: a comment of a PPM is read byte by byte, a PNG's
# chunks are kept, a JPEG's EXIF segments are joined one to all before it. Counts end them at the
# same place every time, as a clock would not. Each is many times what all metadata take, and two
# seconds at the most.
MAX_HEADER_READS = 1_000_000
MAX_HEADER_BYTES = 32 << 20  # in reads no longer than a JPEG's segment
SEGMENT_BYTES = 65_535


class PictureError(Exception):
    """One picture that cannot be used: data to be recorded as a reject, not a failure of the job.

    `stage` is "decode" or "tile", as in the rejects file; `code` is one of
    decode: unidentified (no accepted format, or cut short within its header), zero-size,
    decompression-bomb, truncated, decode-error, size-mismatch; tile: extreme-aspect.
    """

    def __init__(self, stage: Literal["decode", "tile"], code: str, message: str) -> None:
        super().__init__(stage, code, message)  # all three in `args`: survives pickling
        self.stage = stage
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.stage}: {self.code}: {self.message}"


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from the header alone; nothing is decoded.

    Raises PictureError with one of the codes unidentified, zero-size, decompression-bomb,
    truncated, decode-error.
    """
    with open_picture(data) as picture:
        return picture.size


class _Source(io.BytesIO):
    """What Pillow reads from; as long as it reads the header, with limits."""

    in_header = True
    reads_left = MAX_HEADER_READS
    bytes_left = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.in_header:
            self.reads_left -= 1
            if len(data) <= SEGMENT_BYTES:
                self.bytes_left -= len(data)
            if self.reads_left < 0 or self.bytes_left < 0:
                raise PictureError("decode", "decode-error", "its header does not come to an end")
        return data


@contextmanager
def open_picture(data: bytes) -> "Iterator[Image.Image]":
    """The picture with its header read and its pixels not yet decoded.

    Whatever the body of the `with` raises while decoding comes out as PictureError; MemoryError
    does not (it says nothing about the picture). Pillow's warnings about the picture are silenced
    inside: what they announce is either harmless or comes as an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = _Source(data)
            with Image.open(source, formats=FORMATS) as picture:
                source.in_header = False
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{width}x{height} pixels")
                if max(width, height) > MAX_SIDE:
                    message = f"{width}x{height} pixels, a side of more than {MAX_SIDE}"
                    raise PictureError("decode", "decompression-bomb", message)
                yield picture
    except (MemoryError, PictureError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            "decode", "decompression-bomb", f"more than {MAX_PIXELS} pixels: {error}"
        ) from error
    except UnidentifiedImageError as error:
        if _declares_zero_size(data):
            raise PictureError("decode", "zero-size", "width or height is 0") from error
        raise PictureError(
            "decode", "unidentified", f"{len(data)} bytes in none of the accepted formats"
        ) from error
    except Exception as error:
        raise _decode_error(error) from error


def decode_exact(data: bytes) -> Image.Image:
    """The picture in mode RGB, decoded by Pillow. Raises PictureError."""
    with open_picture(data) as picture:
        picture.load()
        # `convert` would copy what is RGB already: 683 MiB of the largest picture
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def decode_fast(data: bytes) -> "NDArray[np.uint8]":
    """The same pixels as `decode_exact`, [height, width, 3]; plain JPEGs by way of simplejpeg.

    simplejpeg is strict about JPEGs that Pillow takes with a shrug, so what it refuses goes to
    Pillow, and Pillow alone says what is a reject. Raises PictureError.
    """
    import simplejpeg

    with open_picture(data) as picture:
        # MPO: the first JPEG in the file, for both decoders. CMYK (mode CMYK) is left to Pillow.
        if picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB"):
            try:
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                    data, colorspace="RGB", fastdct=False, fastupsample=False
                )
                return pixels
            except ValueError:
                pass  # decoded below, or rejected there
    del picture  # with a WebP's decoder, which keeps two frames
    return _array(decode_exact(data))


def _array(picture: Image.Image) -> "NDArray[np.uint8]":
    """A copy that torch may share, made strip by strip: at once it would take two copies more."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, picture.height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, picture.width, bottom)))
    return pixels


def _decode_error(error: Exception) -> PictureError:
    """Pillow has no exception types for broken data, only words."""
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    cut_short = isinstance(error, EOFError) or "truncated" in message.lower()
    return PictureError("decode", "truncated" if cut_short else "decode-error", message)


def _declares_zero_size(data: bytes) -> bool:
    """Whether the header of a PNG, BMP or JPEG gives 0 as width or height.

    Pillow reports such a header as unidentified, without a word about the size.
    """
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        sides = (data[16:20], data[20:24])
    elif data.startswith(b"BM") and len(data) >= 26:
        sides = (data[18:22], data[22:26])
    elif data.startswith(b"\xff\xd8"):
        # frame header: marker SOF0-SOF2, length, 8 bits, height, width
        frame = re.search(rb"\xff[\xc0-\xc2]..\x08(..)(..)", data, re.DOTALL)
        sides = (frame[1], frame[2]) if frame else (b"\1", b"\1")
    else:
        return False
    return not all(any(side) for side in sides)
