"""Small JPEGs of strangers' pictures: decoded in a process of their own, and encoded here."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from jobs.one_thread import OneThread
from pipeline.isolation import IsolatedDecoder
from pipeline.tiling import Tiling, plan_tiles

SIDE = 320  # pixels: twice what the page shows, for screens of two pixels to one
QUALITY = 80
DEADLINE_SECONDS = 20.0
WHOLE = Tiling("dynamic", tile_size=SIDE, resize_to=SIDE, max_tiles=1)  # squeezed into one square


class Thumbnailer:
    """May be asked by several threads; one makes the pictures."""

    def __init__(self) -> None:
        self._decoder = IsolatedDecoder(WHOLE, DEADLINE_SECONDS)
        self._thread = OneThread("thumbnails")

    def jpeg(self, data: bytes) -> bytes:
        """JPEG of the whole picture, SIDE pixels at its longer side.

        Raises:
            PictureError: it cannot be decoded.
            ConnectionAbortedError: this is closed before its turn comes.
        """
        return self._thread.do(lambda: self._jpeg(data))

    def close(self) -> None:
        self._thread.close(self._decoder.close)

    def _jpeg(self, data: bytes) -> bytes:
        width, height = self._decoder.picture_size(data)
        square = np.empty((1, SIDE, SIDE, 3), np.uint8)
        self._decoder.cut_tiles(data, plan_tiles(width, height, WHOLE), square)
        scale = SIDE / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        sink = io.BytesIO()
        picture = Image.fromarray(square[0]).resize(size, Image.Resampling.BICUBIC)
        picture.save(sink, "JPEG", quality=QUALITY)
        return sink.getvalue()
