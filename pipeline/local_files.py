"""Local files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

BLOCK_BYTES = 8 << 20


def create_local(path: str, data: bytes) -> None:
    """Writes a new file; its content comes after its name. Raises FileExistsError."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.open("xb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())


def publish_local(
    path: str, data: bytes | memoryview | None = None, moved: Path | None = None
) -> None:
    """Writes beside the final name, fsyncs the file, renames it, fsyncs the folder.

    A `nameless` file of that folder is not copied: it gets its name.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        is_there = moved is not None and _named(moved, beside)
        with beside.open("r+b" if is_there else "wb") as sink:
            if data is not None:
                sink.write(data)
            elif not is_there:
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


def nameless(folder: Path) -> IO[bytes]:
    """A file that is gone with its process unless it gets a name, for which it need not be copied
    where the file system can do that (Linux, and no network)."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o666)
    except (AttributeError, OSError):
        return tempfile.TemporaryFile()
    return os.fdopen(descriptor, "w+b")


def _named(descriptor: Path, name: Path) -> bool:
    """Whether a nameless file, by its path below /dev/fd, could be given this name."""
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        # With a folder's descriptor, or Python takes link(2), which follows no link on Linux.
        os.link(descriptor, name.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    except OSError:  # of another file system, or one that cannot
        return False
    finally:
        os.close(folder)
    return True


def files_below(folder: str, depth: int | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below a folder, by its path below it. Links to folders are not followed.

    Args:
        depth: levels of folders to look into; 1: the folder's own files. None: all.
    """
    inner = [("", depth)]
    while inner:
        path, levels = inner.pop()
        with suppress(FileNotFoundError), os.scandir(f"{folder}/{path}") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if levels is None or levels > 1:
                        inner.append(
                            (f"{path}{entry.name}/", None if levels is None else levels - 1)
                        )
                else:
                    yield path + entry.name, entry
