"""A small JPEG of a picture that was rejected, made in a process of its own.

Such a picture may crash its decoder, hang it or ask for all memory; here it costs one process. One
that breaks off is shown as far as it goes.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys

from PIL import ImageFile

from pipeline.pictures import PictureError, open_picture

SIDE = 160  # pixels
SECONDS = 20
MAX_BYTES = 1 << 30
MODULE = "jobs.thumbnail"


def thumbnail(data: bytes) -> bytes | None:
    """JPEG of at most SIDE pixels a side; None where the picture cannot be decoded at all."""
    try:
        done = subprocess.run(  # noqa: S603 this interpreter and our own module
            # -P: whatever lies in the current folder is not ours
            [sys.executable, "-P", "-m", MODULE],
            input=data,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    sink = io.BytesIO()
    try:
        with open_picture(sys.stdin.buffer.read()) as picture:
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = picture.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            small.save(sink, "JPEG", quality=75)
    except (PictureError, MemoryError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(sink.getvalue())


if __name__ == "__main__":
    main()
