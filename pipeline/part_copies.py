"""Copies of published parts on this machine, compared with what their commit says of them."""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

import pyarrow as pa

from pipeline.commits import PartFile, PublishedObject
from pipeline.local_files import BLOCK_BYTES
from pipeline.storage import Storage, join


class PartError(Exception):
    """A part that cannot be read as what it should be; the message is the problem."""


class Sink(Protocol):
    """Takes the bytes of an object that is being written."""

    def write(self, data: bytes | memoryview) -> int: ...


class OpenPart(ABC):
    """The rows of a part in order, batch by batch, so that no more of them need be in memory."""

    num_batches: int

    @abstractmethod
    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of the schema of the layout, all of its columns or those.

        Raises:
            PartError: what is there cannot be read as that.
        """

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in order, a batch at a time or less.

        Raises:
            PartError: as `batch`.
        """
        for number in range(self.num_batches):
            yield self.batch(number, columns)


@contextmanager
def local_copies(
    part: PartFile, output: str, storage: Storage, sizes: Mapping[str, int] | None = None
) -> Iterator[dict[str, Path]]:
    """Each object of a part, by its path below OUTPUT, as a nameless file of this machine: where
    the process is killed nothing of it stays.

    Args:
        sizes: in bytes, by path below OUTPUT, where it has been listed; None: they are looked up.

    Raises:
        PartError: an object is missing, or not the bytes that were committed.
    """
    with ExitStack() as files:
        copies = {}
        for published in part.objects:
            try:
                copy = files.enter_context(local_copy(published, output, storage, sizes))
            except PartError as error:
                beside = published.path != part.path
                raise PartError(
                    f"beside it, {published.path}: {error}" if beside else f"{error}"
                ) from error
            copies[published.path] = Path(f"/dev/fd/{copy.fileno()}")
        yield copies


def local_copy(
    published: PublishedObject,
    output: str,
    storage: Storage,
    sizes: Mapping[str, int] | None = None,
) -> IO[bytes]:
    """A published object as a nameless file of this machine; see `local_copies`.

    Raises:
        PartError: it is missing, or not the bytes that were committed.
    """
    url = join(output, published.path)
    with ExitStack() as closing:
        copy = closing.enter_context(tempfile.TemporaryFile())
        try:
            size = storage.info(url).size if sizes is None else sizes.get(published.path)
            if size is None:
                raise PartError("missing")
            check_size(size, published)
            digest = copy_hashed(url, published.bytes, storage, copy)
        except FileNotFoundError as error:
            raise PartError("missing") from error
        if digest != published.sha256:
            raise PartError("its bytes are not those that were committed (sha256 differs)")
        closing.pop_all()
    return copy


def check_size(size: int, published: PublishedObject) -> None:
    """Raises PartError where an object has another size than its commit says."""
    if size != published.bytes:
        raise PartError(f"{size} bytes, the commit says {published.bytes}")


def copy_hashed(url: str, num_bytes: int, storage: Storage, sink: IO[bytes]) -> str:
    """Copies so many bytes of an object, block by block; gives their sha256."""
    digest = hashlib.sha256()
    for start in range(0, num_bytes, BLOCK_BYTES):
        block = storage.read_range(url, start, min(start + BLOCK_BYTES, num_bytes))
        digest.update(block)
        sink.write(block)
    sink.flush()
    return digest.hexdigest()
