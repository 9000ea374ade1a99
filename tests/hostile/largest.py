"""How much memory the largest picture that is accepted takes, in each format and mode.

    python -m tests.hostile.largest

Writes benchmarks/results/<date>-largest-pictures-cpu.{json,md}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, Table, machine, write_result
from pipeline.pictures import MAX_PIXELS
from pipeline.tiling import Tiling, cut_tiles, picture_size, plan_tiles
from tests.builders import REPOSITORY
from tests.hostile.pictures import png, webp_canvas

SIDE = 13_377  # squared just below MAX_PIXELS
LONG = 399_000  # times 448


def flat(mode: str) -> Image.Image:
    """What is in it makes no difference to the memory, and one colour is encoded soon."""
    return Image.new(mode, (SIDE, SIDE), 99)


def saved(
    make: Callable[[], Image.Image], kind: str, **options: object
) -> Callable[[Path], object]:
    return lambda path: make().save(path, kind, **options)


def written(make: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(make())


LARGEST: dict[str, Callable[[Path], object]] = {
    "JPEG": saved(lambda: flat("RGB"), "JPEG"),
    "JPEG progressive, 4:4:4": saved(lambda: flat("RGB"), "JPEG", progressive=True, subsampling=0),
    "JPEG progressive, CMYK": saved(lambda: flat("CMYK"), "JPEG", progressive=True),
    "PNG RGB": saved(lambda: flat("RGB"), "PNG", compress_level=1),
    "PNG RGBA": saved(lambda: flat("RGBA"), "PNG", compress_level=1),
    "PNG palette": saved(lambda: flat("P"), "PNG", compress_level=1),
    "PNG 16-bit grey": written(lambda: png(SIDE, SIDE, depth=16)),
    "PNG 16-bit RGBA": written(lambda: png(SIDE, SIDE, depth=16, colour=6)),
    "PPM 16-bit": written(lambda: b"P5 %d %d 65535\n" % (SIDE, SIDE) + bytes(2 * SIDE * SIDE)),
    "BMP grey": saved(lambda: flat("L"), "BMP"),
    "TIFF deflate": saved(lambda: flat("RGB"), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF CMYK LZW": saved(lambda: flat("CMYK"), "TIFF", compression="tiff_lzw"),
    "GIF": saved(lambda: flat("P"), "GIF"),
    "WebP": saved(lambda: flat("RGB"), "WEBP", method=0),
    "WebP animated": written(lambda: webp_canvas(SIDE)),
    "AVIF": saved(lambda: flat("RGB"), "AVIF", quality=40, speed=10),
    "AVIF RGBA": saved(lambda: flat("RGBA"), "AVIF", quality=40, speed=10),
    "PNG of 16 777 216 by 10": written(lambda: png(1 << 24, 10, colour=2)),
    "PNG of 448 by 399 000, center-crop": saved(
        lambda: Image.new("RGB", (448, LONG)), "PNG", compress_level=1
    ),
}


def measured() -> Table:
    """Each is encoded in one process and tiled in another."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "picture")
        for name in LARGEST:
            _run("encode", name, path)
            exact, fast = (json.loads(_run(mode, name, path)) for mode in ("exact", "fast"))
            rows.append((name, Path(path).stat().st_size >> 20, *exact, *fast))
    columns = ("picture", "file, MiB", "exact, MiB", "exact, s", "fast, MiB", "fast, s")
    title = f"Peak of tiling the largest pictures accepted ({MAX_PIXELS} pixels), above the worker"
    return Table(title, columns, tuple(rows))


def _run(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "tests.hostile.largest", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return run.stdout


def tile(mode: str, name: str, path: Path) -> tuple[int, float]:
    """Peak in MiB above what is there with the file read, and seconds."""
    data = path.read_bytes()
    if mode == "fast":
        import simplejpeg  # noqa: F401
        import torch  # noqa: F401
    kind = "center-crop" if "center-crop" in name else "dynamic"
    tiling = Tiling(kind, 448, 448, resize=mode)  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, began = _peak_mib(), time.perf_counter()
    plan = plan_tiles(*picture_size(data), tiling)
    out = np.empty((plan.tile_count, 448, 448, 3), np.uint8)
    cut_tiles(data, tiling, plan, out)
    return _peak_mib() - before, round(time.perf_counter() - began, 1)


def _peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = None
    if len(sys.argv) == 1:
        print(write_result("largest-pictures", "cpu", machine(), [measured()], [], RESULTS))
    elif sys.argv[1] == "encode":
        LARGEST[sys.argv[2]](Path(sys.argv[3]))
    else:
        print(json.dumps(tile(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
