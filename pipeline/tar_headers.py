"""`tarfile` as the parser of a stranger's headers, with bounds on what a header may ask of it.

`tarfile` reads the payload of a long-name or pax header whole, whatever size it claims, recurses
once for each header that stands before a member, looks through pax records with regular expressions
that take quadratic time (CVE-2024-6232), and goes backwards for a negative size (CVE-2025-8194).
Which of this is mended depends on the Python; here it is bounded under every one.
"""

from __future__ import annotations

import re
import tarfile

MAX_NAME_BYTES = 4096  # PATH_MAX of Linux
MAX_HEADER_BYTES = 64 << 10  # of one pax header; GNU tar's with all attributes have a few KiB
MAX_HEADERS = 16  # in front of one member; GNU tar writes three at the most

PAX_NUMBER = re.compile(rb"[0-9]{1,19}")
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class RefusedHeaderError(tarfile.ReadError):
    """A header that is well-formed enough for `tarfile`, but not accepted here."""


class Archive(tarfile.TarFile):
    """Gives one member after the other, and keeps none of them."""

    num_headers = 0

    def __init__(self, source: object) -> None:
        # One encoding everywhere, so that the same archive gives the same keys on every machine.
        super().__init__(fileobj=source, tarinfo=Header, encoding="utf-8")  # type: ignore[arg-type]

    def next(self) -> tarfile.TarInfo | None:
        self.num_headers = 0
        entry = super().next()
        self.members: list[tarfile.TarInfo] = []  # tarfile keeps every member for ever
        return entry


class Header(tarfile.TarInfo):
    """A header block; `_proc_member` is where `tarfile` lets subclasses in."""

    def _proc_member(self, archive: Archive) -> tarfile.TarInfo:
        if self.size < 0:
            raise RefusedHeaderError(f"a size of {self.size}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise RefusedHeaderError(f"sparse member {shown(self.name)}")
        if self.type in LONG_NAMES or self.type in PAX_HEADERS:
            archive.num_headers += 1
            if archive.num_headers > MAX_HEADERS:
                raise RefusedHeaderError(f"more than {MAX_HEADERS} headers before a member")
            limit = MAX_NAME_BYTES + 1 if self.type in LONG_NAMES else MAX_HEADER_BYTES
            if self.size > limit:
                raise RefusedHeaderError(f"a header of {self.size} bytes, more than {limit}")
        entry: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        if archive.offset < archive.fileobj.tell():
            raise RefusedHeaderError("a header that leads backwards")
        return entry

    def _proc_pax(self, archive: Archive) -> tarfile.TarInfo:
        """Of a pax header the name and the size of the next member count, nothing else."""
        source = archive.fileobj
        assert source is not None
        payload = source.read(self._block(self.size))  # type: ignore[attr-defined]
        if len(payload) < self.size:
            raise tarfile.ReadError("unexpected end of data")
        records = pax_records(payload[: self.size])
        if any(key.startswith(b"GNU.sparse.") for key in records):
            sparse = records.get(b"GNU.sparse.name", b"").decode("utf-8", "replace")
            raise RefusedHeaderError(f"sparse member {shown(sparse)}".rstrip())
        name, size = records.get(b"path"), records.get(b"size")
        if self.type == tarfile.XGLTYPE and (name is not None or size is not None):
            raise RefusedHeaderError("a global pax header with a name or a size")
        try:
            entry = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        entry.offset = self.offset
        if name is not None:
            entry.name = _name(name)
        if size is not None:
            entry.size = _size(size)
            if entry.isreg() or entry.type not in tarfile.SUPPORTED_TYPES:
                archive.offset = entry.offset_data + self._block(entry.size)  # type: ignore[attr-defined]
        return entry


def pax_records(payload: bytes) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header, in linear time.

    Raises:
        RefusedHeaderError: one of them is not as POSIX has it.
    """
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(payload):
        space = payload.find(b" ", at, at + 20)
        digits = payload[at:space] if space > at else b""
        end = at + int(digits) if PAX_NUMBER.fullmatch(digits) else at
        key, equals, value = payload[space + 1 : end].partition(b"=")
        if not space < end <= len(payload) or not key or not equals or value[-1:] != b"\n":
            raise RefusedHeaderError("a malformed pax record")
        records[key] = value[:-1]
        at = end
    return records


def shown(name: str) -> str:
    """A name from an archive as it may stand in a log: printable, and not too long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _name(value: bytes) -> str:
    if len(value) > MAX_NAME_BYTES:
        raise RefusedHeaderError(f"a name of {len(value)} bytes, more than {MAX_NAME_BYTES}")
    return value.decode("utf-8", "surrogateescape").rstrip("/")


def _size(value: bytes) -> int:
    if not PAX_NUMBER.fullmatch(value):
        raise RefusedHeaderError(f"a size of {shown(repr(value[:40]))}")
    return int(value)
