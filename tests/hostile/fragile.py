"""A decoder with the faults that real ones have had, for workers and for their child processes.

A picture asks for its fault by a marker behind its end, which decoders pass over.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline import isolation, pictures

if TYPE_CHECKING:
    from pipeline.chunks import TileSettings
    from pipeline.records import Row
    from pipeline.stages import Attempts

MARKER = b"fault:"
_open = Image.open


def faulty(image: bytes, fault: str) -> bytes:
    """The picture that brings about `fault`: `open-` (its header) or `load-` (its pixels), and
    `segv`, `abort`, `hang`, `memory`, or `kill-once:<path of a flag>`.
    """
    return image + MARKER + fault.encode() + b";"


def strike(fault: str) -> None:
    if fault == "segv":
        ctypes.string_at(0)
    elif fault == "abort":
        os.abort()
    elif fault == "hang":  # in C, with the interpreter's lock
        ctypes.PyDLL(None).sleep(3600)
    elif fault == "memory":
        raise MemoryError
    else:
        flag = Path(fault.removeprefix("kill-once:"))
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fragile_open(source: Any, **options: Any) -> Image.Image:
    data = source.getvalue()
    _, found, rest = data.rpartition(MARKER)
    when, _, fault = rest[: rest.find(b";")].decode().partition("-") if found else ("", "", "")
    if when == "open":
        strike(fault)
    picture = _open(source, **options)
    if when == "load":
        load = picture.load

        def fragile_load() -> Any:
            strike(fault)
            return load()

        picture.load = fragile_load  # type: ignore[method-assign]
    return picture


def install() -> None:
    pictures.Image.open = fragile_open  # type: ignore[assignment]
    isolation.CHILD = "tests.hostile.fragile"


def fragile_tile_stage(row: Row, settings: TileSettings, attempts: Attempts) -> Iterator[Row]:
    """Stands in for `tile_stage` in a worker."""
    from pipeline.stages import tile_stage  # not for the child, which starts faster without

    install()
    yield from tile_stage(row, settings, attempts)


if __name__ == "__main__":
    install()
    isolation.main()
