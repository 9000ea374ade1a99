"""Reads a tar shard front to back, in bounded memory, and knows whether it was whole.

Neither `tarfile` nor `webdataset` tells a shard that ends from one that was cut: both stop quietly
at a member boundary or inside a header. Here the end-of-archive mark must be there, with nothing
but zeros behind it, and every byte that the storage promised must have been seen.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.local_files import BLOCK_BYTES
from pipeline.printable import printable
from pipeline.storage import FileInfo, Storage, redact
from pipeline.tar_headers import Archive, RefusedHeaderError, shown

TAR_BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20  # with the copies on its way, 1.3 GiB in a reading task

# webdataset's rule for members that are not samples: `__name__` at the top, `__folder__/…`.
META_MEMBER = re.compile(r"__[^/]*__($|/)")
COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


class BrokenShardError(Exception):
    """The archive cannot be read to its end: at byte `offset` it breaks, or is `cut` off.

    `member` is the name of the member in which that is, where its header could be read.
    """

    def __init__(
        self, url: str, offset: int, reason: str, cut: bool = False, member: str | None = None
    ) -> None:
        super().__init__(f"{redact(url)}: {printable(reason)} at byte {offset}")
        self.offset = offset
        self.cut = cut
        self.member = member


@dataclass(frozen=True)
class Member:
    """A regular file of the archive. `data` is None where it was too large to be held."""

    name: str
    size: int
    data: bytes | None


class ForwardReader(io.RawIOBase):
    """A file that only goes forward, fetched in blocks by range, the next one ahead of time.

    A range request that breaks is asked for again by the storage layer, so reading goes on at the
    byte where the connection broke.
    """

    def __init__(self, url: str, storage: Storage, size: int) -> None:
        self._url = url
        self._storage = storage
        self.num_bytes = size
        self._position = 0
        self._block = b""
        self._block_start = 0
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.last_read = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        assert offset >= self._position, "this reader only goes forward"
        self._position = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; fewer only at the end of the object."""
        end = (
            self.num_bytes
            if size is None or size < 0
            else min(self._position + size, self.num_bytes)
        )
        pieces = []
        while self._position < end:
            start = self._position - self._block_start
            if not 0 <= start < len(self._block):
                self._fetch()
                start = self._position - self._block_start
            piece = self._block[start : start + end - self._position]
            pieces.append(piece)
            self._position += len(piece)
        self.last_read = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self.last_read

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _fetch(self) -> None:
        start = self._position // BLOCK_BYTES * BLOCK_BYTES
        if self._ahead is not None and self._ahead[0] == start:
            self._block = self._ahead[1].result()
        else:
            self._block = self._request(start)
        self._block_start = start
        following = start + BLOCK_BYTES
        self._ahead = None
        if following < self.num_bytes:
            self._ahead = (following, self._pool.submit(self._request, following))

    def _request(self, start: int) -> bytes:
        end = min(start + BLOCK_BYTES, self.num_bytes)
        return self._storage.read_range(self._url, start, end)


def read_members(url: str, storage: Storage, info: FileInfo) -> Iterator[Member]:
    """Yields the regular files of a tar in order.

    Raises:
        BrokenShardError: the archive is cut, damaged, or changed while it was read. Everything
            yielded before that is whole.
        OSError: the storage failed for good.
    """
    with ForwardReader(url, storage, info.size) as source:
        yield from _members(url, source)
        _check_end(url, source)
    if storage.info(url) != info:
        raise BrokenShardError(url, info.size, "the object was replaced while it was read")


def _members(url: str, source: ForwardReader) -> Iterator[Member]:
    archive: Archive | None = None
    while True:
        offset = 0 if archive is None else archive.offset
        try:
            if archive is None:
                archive = Archive(source)
            entry = archive.next()
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise _broken(url, source, offset, error) from error
        if entry is None:
            return
        if not entry.isreg() or META_MEMBER.match(entry.name):
            continue
        name = _clean(entry.name)
        if entry.offset_data + entry.size > source.num_bytes:
            reason = f"cut inside {shown(name)}"
            raise BrokenShardError(url, source.num_bytes, reason, True, name)
        if entry.size > MAX_MEMBER_BYTES:
            yield Member(name, entry.size, None)
            continue
        source.seek(entry.offset_data)
        yield Member(name, entry.size, source.read(entry.size))


def _broken(url: str, source: ForwardReader, offset: int, error: Exception) -> BrokenShardError:
    """What to say of a header that could not be read; the next was due at `offset`."""
    if isinstance(error, RefusedHeaderError):
        return BrokenShardError(url, offset, str(error))
    if offset == 0:
        kind = next((kind for magic, kind in COMPRESSED if source.last_read.startswith(magic)), "")
        hint = f"compressed with {kind}; unpack it first" if kind else str(error)
        return BrokenShardError(url, 0, f"not a tar archive ({hint})")
    cut = source.tell() >= source.num_bytes
    reason = f"cut inside a member ({error})" if cut else f"bad member header ({error})"
    # the next header may be due behind the end
    return BrokenShardError(url, min(offset, source.num_bytes), reason, cut)


def _clean(name: str) -> str:
    """Names that are not UTF-8 keep their odd bytes as escapes, so that they stay distinct."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _check_end(url: str, source: ForwardReader) -> None:
    """The last block read must be an end mark, and all behind it zeros."""
    mark = source.last_read
    offset = source.tell() - len(mark)
    if len(mark) < TAR_BLOCK:
        raise BrokenShardError(url, source.tell(), "cut short, no end-of-archive mark,", cut=True)
    if mark.count(0) != len(mark):
        raise BrokenShardError(url, offset, "damaged member header")
    while rest := source.read(BLOCK_BYTES):
        if rest.count(0) != len(rest):
            raise BrokenShardError(url, offset, "data behind the end-of-archive mark")
