"""Local files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

BLOCK_BYTES = 8 << 20


def create_local(path: str, data: bytes) -> None:
    """Writes a new file; its content comes after its name. Raises FileExistsError."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.open("xb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())


def publish_local(path: str, data: bytes | None = None, moved: Path | None = None) -> None:
    """Writes beside the final name, fsyncs the file, renames it, fsyncs the folder."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as sink:
            if data is not None:
                sink.write(data)
            else:
                assert moved is not None
                with moved.open("rb") as source:
                    while block := source.read(BLOCK_BYTES):
                        sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
