"""Reads a tar shard front to back, in bounded memory, and knows whether it was whole.

Neither `tarfile` nor `webdataset` tells a shard that ends from one that was cut: both stop quietly
at a member boundary or inside a header. Here the end-of-archive mark must be there, with nothing
but zeros behind it, and every byte that the storage promised must have been seen.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.forward_reader import ForwardReader
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


def read_members(url: str, storage: Storage, info: FileInfo) -> Iterator[Member]:
    """Yields the regular files of a tar in order.

    Raises:
        BrokenShardError: the archive is cut, damaged, or changed while it was read. Everything
            yielded before that is whole.
        DamagedObjectError: what came is not what the store's checksum says.
        OSError: the storage failed for good.
    """
    with ForwardReader(url, storage, info) as source:
        try:
            yield from _members(url, source)
            _check_end(url, source)
        except BrokenShardError as error:
            if error.cut:  # which may be accepted: then it must be the archive that is cut
                source.check()
            raise
        source.check()
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
