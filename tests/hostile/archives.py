"""Archives as a stranger might make them, and what must come of each.

Every one is built around three sound samples `a`, `b`, `c` of a picture and a caption, so that what
is lost shows.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.builders import Members, picture, tar_bytes

BLOCK = 512
IMAGES = {key: picture(40 + 8 * i, 48, seed=i) for i, key in enumerate("abc")}
SOUND: list[tuple[str, bytes]] = [
    member
    for key, image in IMAGES.items()
    for member in ((f"{key}.jpg", image), (f"{key}.txt", b"caption"))
]
END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Archive:
    """`failure`: words of the reason why the shard is not committed; None where it is.

    `embedded` and `rejects` are what a committed one holds: keys in order, and code by key.
    """

    build: Callable[[], bytes]
    failure: str | None = None
    embedded: tuple[str, ...] = ("a", "b", "c")
    rejects: tuple[tuple[str, str], ...] = ()


def header(
    name: str = "x.jpg",
    size: int = 0,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    size_field: bytes | None = None,
) -> bytes:
    """One header block with a right checksum; `size_field` goes in as it is (12 bytes)."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = size, kind, link
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-BLOCK:])
    if size_field is not None:
        block[124:136] = size_field
    return checked(block)


def checked(block: bytearray) -> bytes:
    """The header block with the checksum that belongs to it."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: str, data: bytes, **fields: bytes) -> bytes:
    return header(name, len(data), **fields) + padded(data)  # type: ignore[arg-type]


def pax(records: dict[str, str | bytes], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header with these records."""
    payload = b""
    for key, value in records.items():
        text = value if isinstance(value, bytes) else value.encode()
        rest = b" " + key.encode() + b"=" + text + b"\n"
        length = len(rest)
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        payload += str(length).encode() + rest
    return raw_pax(payload, kind)


def raw_pax(payload: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("PaxHeaders/x", len(payload), kind) + padded(payload)


def long_name(name: bytes) -> bytes:
    return header("././@LongLink", len(name) + 1, tarfile.GNUTYPE_LONGNAME) + padded(name + b"\0")


def base256(number: int) -> bytes:
    return (
        (number % (1 << 96)).to_bytes(12, "big")
        if number < 0
        else ((number | 1 << 95).to_bytes(12, "big"))
    )


def body(members: Members = SOUND) -> bytes:
    """The members' headers and data, without the end of the archive."""
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        entries = archive.getmembers()
    last = entries[-1]
    return data[: last.offset_data + -(-last.size // BLOCK) * BLOCK]


def before(*blocks: bytes) -> bytes:
    """Something odd, then the sound samples."""
    return b"".join(blocks) + body() + END


def behind(*blocks: bytes) -> bytes:
    """The sound samples, then something odd."""
    return body() + b"".join(blocks) + END


def offset_of(name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(SOUND))) as archive:
        return archive.getmember(name).offset


def patched(offset: int, change: bytes, recount: bool = False) -> bytes:
    """The sound archive with bytes changed; `recount`: in a header, which gets its checksum."""
    data = bytearray(tar_bytes(SOUND))
    data[offset : offset + len(change)] = change
    if recount:
        start = offset // BLOCK * BLOCK
        data[start : start + BLOCK] = checked(data[start : start + BLOCK])
    return bytes(data)


def cut(at: int) -> bytes:
    return tar_bytes(SOUND)[:at]


def resized(name: str, size: int) -> bytes:
    return patched(offset_of(name) + 124, b"%011o\0" % size, recount=True)


def old_sparse(extended: int) -> bytes:
    """GNU's own sparse member with a chain of `extended` blocks of its map."""
    block = bytearray(header("x.jpg", 0, tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    more = bytearray(BLOCK)
    more[504] = 1
    return checked(block) + bytes(more) * extended


def tiny_members(count: int) -> bytes:
    blocks = [member(f"{index:06d}.txt", b"t") for index in range(count)]
    return b"".join(blocks) + END


def crowd(count: int) -> bytes:
    return behind(*(header(f"z.x{index}") for index in range(count)))


def write_with_huge_member(path: Path, size: int) -> None:
    """The sound samples behind a member of `size` bytes that takes no room on disk."""
    with path.open("wb") as file:
        file.write(header("huge.jpg", size))
        file.seek(-(-size // BLOCK) * BLOCK, io.SEEK_CUR)
        file.write(body() + END)


NO_IMAGE = "read/no-image"
DEEP = b"[" * 200_000
SURROGATE = json.dumps({"url": "\ud800"}).encode()
JSON_BOMB = b'{"url":[' + b"[]," * (1 << 20) + b"[]]}"

ARCHIVES: dict[str, Archive] = {
    # sound, if odd
    "ustar": Archive(lambda: tar_bytes(SOUND)),
    "one-end-block": Archive(lambda: body() + bytes(BLOCK)),
    "empty-tar": Archive(lambda: END, embedded=()),
    "only-zeros": Archive(lambda: bytes(20 * BLOCK), embedded=()),
    "unicode-names": Archive(
        lambda: behind(member("猫/é.jpg", IMAGES["a"])), embedded=("a", "b", "c", "猫/é")
    ),
    "latin-1-names": Archive(
        lambda: behind(patched_name(b"caf\xe9.jpg")), embedded=("a", "b", "c", "caf\\xe9")
    ),
    "gnu-long-name": Archive(
        lambda: behind(long_name(b"d/" * 500 + b"x.jpg"), member("x.jpg", IMAGES["a"])),
        embedded=("a", "b", "c", "d/" * 500 + "x"),
    ),
    "pax-name": Archive(
        lambda: behind(pax({"path": "d/" * 500 + "y.jpg"}), member("x.jpg", IMAGES["a"])),
        embedded=("a", "b", "c", "d/" * 500 + "y"),
    ),
    "pax-size": Archive(
        lambda: behind(
            pax({"size": str(len(IMAGES["a"]))}), header("x.jpg", 0) + padded(IMAGES["a"])
        ),
        embedded=("a", "b", "c", "x"),
    ),
    "pax-attributes": Archive(
        lambda: before(pax({"SCHILY.xattr.user.x": bytes(range(256)) * 100, "mtime": "1.5"})),
    ),
    "git-archive": Archive(lambda: before(pax({"comment": "0" * 40}, tarfile.XGLTYPE))),
    "parent-folder": Archive(
        lambda: behind(member("../../etc/x.jpg", IMAGES["a"])),
        embedded=("a", "b", "c", "../../etc/x"),
    ),
    "absolute-path": Archive(
        lambda: behind(member("/etc/x.jpg", IMAGES["a"])), embedded=("a", "b", "c", "/etc/x")
    ),
    "nul-in-name": Archive(
        lambda: behind(pax({"path": "n\0ul.jpg"}), member("x.jpg", IMAGES["a"])),
        embedded=("a", "b", "c", "n\0ul"),
    ),
    "control-characters": Archive(
        lambda: behind(member("\x1b[2J.jpg", IMAGES["a"])), embedded=("a", "b", "c", "\x1b[2J")
    ),
    "empty-name": Archive(lambda: behind(member("", IMAGES["a"]))),
    "no-key": Archive(lambda: behind(member("README", b"x"), member(".jpg", IMAGES["a"]))),
    "links": Archive(
        lambda: behind(
            header("l.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
            header("m.jpg", kind=tarfile.LNKTYPE, link="a.jpg"),
            header("n.jpg", kind=tarfile.SYMTYPE, link="n.jpg"),
        )
    ),
    "devices": Archive(
        lambda: behind(
            header("d.jpg", kind=tarfile.CHRTYPE),
            header("e.jpg", kind=tarfile.BLKTYPE),
            header("f.jpg", kind=tarfile.FIFOTYPE),
            header("g.jpg/", kind=tarfile.DIRTYPE),
        )
    ),
    "unknown-type": Archive(lambda: behind(member("u.jpg", IMAGES["a"], kind=b"Z"))),
    "duplicate-member": Archive(
        lambda: before(member("a.JPG", IMAGES["b"])),
        embedded=("b", "c"),
        rejects=(("a", "read/duplicate-member"),),
    ),
    "key-comes-again": Archive(
        lambda: behind(member("a.jpg", IMAGES["b"])), embedded=("a", "b", "c", "a")
    ),
    "split-samples": Archive(
        lambda: tar_bytes([SOUND[i] for i in (0, 2, 4, 1, 3, 5)]),
        rejects=(("a", NO_IMAGE), ("b", NO_IMAGE), ("c", NO_IMAGE)),
    ),
    "out-of-order": Archive(lambda: tar_bytes(list(reversed(SOUND))), embedded=("c", "b", "a")),
    "tar-of-tars": Archive(
        lambda: behind(member("inner.tar", tar_bytes(SOUND))), rejects=(("inner", NO_IMAGE),)
    ),
    "tar-as-picture": Archive(
        lambda: behind(member("t.jpg", tar_bytes(SOUND))),
        rejects=(("t", "decode/unidentified"),),
    ),
    "zeroed-data": Archive(
        lambda: patched(offset_of("b.jpg") + BLOCK, bytes(len(IMAGES["b"]))),
        embedded=("a", "c"),
        rejects=(("b", "decode/unidentified"),),
    ),
    "empty-picture": Archive(
        lambda: behind(header("e.jpg")), rejects=(("e", "decode/unidentified"),)
    ),
    "thousands-of-extensions": Archive(
        lambda: crowd(5000), rejects=(("z", "read/too-many-members"),)
    ),
    "long-caption": Archive(
        lambda: behind(member("z.jpg", IMAGES["a"]), member("z.txt", b"x" * (5 << 20))),
        rejects=(("z", "read/oversized"),),
    ),
    "json-nested-deep": Archive(
        lambda: behind(member("z.jpg", IMAGES["a"]), member("z.json", DEEP)),
        embedded=("a", "b", "c", "z"),
    ),
    "json-half-surrogate": Archive(
        lambda: behind(member("z.jpg", IMAGES["a"]), member("z.json", SURROGATE)),
        embedded=("a", "b", "c", "z"),
    ),
    "json-bomb": Archive(
        lambda: behind(member("z.jpg", IMAGES["a"]), member("z.json", JSON_BOMB)),
        embedded=("a", "b", "c", "z"),
    ),
    # cut
    "empty-file": Archive(lambda: b"", "not a tar archive"),
    "cut-in-first-header": Archive(lambda: cut(100), "not a tar archive"),
    "cut-in-header": Archive(lambda: cut(offset_of("b.jpg") + 100), "cut"),
    "cut-behind-header": Archive(lambda: cut(offset_of("b.jpg") + BLOCK), "cut inside b.jpg"),
    "cut-in-data": Archive(lambda: cut(offset_of("b.jpg") + BLOCK + 9), "cut inside b.jpg"),
    "cut-at-a-member": Archive(lambda: cut(offset_of("b.txt")), "cut short"),
    "cut-in-padding": Archive(lambda: cut(offset_of("c.jpg") - 3), "cut"),
    "cut-in-long-name": Archive(
        lambda: body() + long_name(b"x" * 2000)[: 2 * BLOCK], "cut inside a member"
    ),
    "cut-in-pax": Archive(
        lambda: body() + pax({"path": "x" * 2000})[: 2 * BLOCK], "cut inside a member"
    ),
    "no-end": Archive(body, "no end-of-archive mark"),
    # damaged
    "flipped-header-bit": Archive(lambda: patched(offset_of("b.jpg"), b"B"), "damaged member"),
    "garbage-header": Archive(
        lambda: patched(offset_of("b.jpg"), bytes(range(256)) * 2), "damaged member"
    ),
    "zeroed-header": Archive(
        lambda: patched(offset_of("b.jpg"), bytes(BLOCK)), "data behind the end-of-archive mark"
    ),
    "two-archives": Archive(lambda: tar_bytes(SOUND) * 2, "data behind the end-of-archive mark"),
    "garbage-behind": Archive(lambda: tar_bytes(SOUND) + b"x", "data behind the end-of-archive"),
    # sizes that lie
    "size-too-small": Archive(lambda: resized("b.jpg", 3), "damaged member header"),
    "size-too-large": Archive(
        lambda: resized("b.jpg", len(padded(IMAGES["b"])) + 1), "damaged member header"
    ),
    "size-that-takes-a-member-in": Archive(  # no reader can tell; the picture is still one
        lambda: resized("b.jpg", len(padded(IMAGES["b"])) + 2 * BLOCK)
    ),
    "size-beyond-the-end": Archive(lambda: resized("b.jpg", 1 << 32), "cut inside b.jpg"),
    "size-2-to-80": Archive(
        lambda: behind(header(size_field=base256(1 << 80))), "cut inside x.jpg"
    ),
    "size-negative": Archive(lambda: behind(header(size_field=base256(-1024))), "a size of -1024"),
    "size-negative-first": Archive(
        lambda: before(header(size_field=base256(-BLOCK))), "a size of -512"
    ),
    "size-negative-of-link": Archive(
        lambda: behind(header(kind=b"Z", size_field=base256(-BLOCK))), "a size of -512"
    ),
    "size-no-number": Archive(
        lambda: behind(header(size_field=b"12345678901z")), "damaged member header"
    ),
    "pax-size-negative": Archive(lambda: behind(pax({"size": "-512"}), header()), "a size of"),
    "pax-size-no-number": Archive(lambda: behind(pax({"size": "many"}), header()), "a size of"),
    "pax-size-huge": Archive(lambda: behind(pax({"size": "9" * 19}), header()), "cut inside x.jpg"),
    "pax-size-of-5000-digits": Archive(
        lambda: behind(pax({"size": "9" * 5000}), header()), "a size of"
    ),
    "global-size": Archive(
        lambda: before(pax({"size": "1"}, tarfile.XGLTYPE)), "a global pax header with"
    ),
    "global-name": Archive(
        lambda: before(pax({"path": "x.jpg"}, tarfile.XGLTYPE)), "a global pax header with"
    ),
    # headers that ask for too much
    "pax-claims-10-gb": Archive(
        lambda: behind(header("p", 10 << 30, tarfile.XHDTYPE, size_field=base256(10 << 30))),
        "a header of 10737418240 bytes",
    ),
    "long-name-claims-10-gb": Archive(
        lambda: behind(header("p", 0, tarfile.GNUTYPE_LONGNAME, size_field=base256(10 << 30))),
        "a header of 10737418240 bytes",
    ),
    "long-name-negative": Archive(
        lambda: behind(header("p", 0, tarfile.GNUTYPE_LONGNAME, size_field=base256(-1024))),
        "a size of -1024",
    ),
    "long-name": Archive(
        lambda: behind(long_name(b"x" * 5000), header()), "a header of 5001 bytes"
    ),
    "pax-long-name": Archive(
        lambda: behind(pax({"path": "x" * 5000}), header()), "a name of 5000 bytes"
    ),
    "pax-digits": Archive(  # CVE-2024-6232: six seconds for each such member
        lambda: behind(raw_pax(b"1" * 65_000), header()), "a malformed pax record"
    ),
    "pax-short-lengths": Archive(  # each record's key reaches to the end: a GiB of keys
        lambda: behind(raw_pax(b"2 " * 30_000 + b"="), header()), "a malformed pax record"
    ),
    "pax-length-zero": Archive(
        lambda: behind(raw_pax(b"0 path=x\n"), header()), "a malformed pax record"
    ),
    "pax-length-beyond": Archive(
        lambda: behind(raw_pax(b"99 path=x\n"), header()), "a malformed pax record"
    ),
    "pax-no-newline": Archive(
        lambda: behind(raw_pax(b"9 path=xy"), header()), "a malformed pax record"
    ),
    "pax-in-digits-only": Archive(
        lambda: before(pax({"comment": "1" * 60_000})),
    ),
    "long-name-chain": Archive(
        lambda: behind(long_name(b"x") * 5000, header()), "more than 16 headers"
    ),
    "pax-chain": Archive(lambda: behind(pax({"a": "b"}) * 5000, header()), "more than 16 headers"),
    "global-chain": Archive(
        lambda: behind(pax({"a": "b"}, tarfile.XGLTYPE) * 5000, header()), "more than 16 headers"
    ),
    "pax-before-nothing": Archive(lambda: behind(pax({"path": "x.jpg"})), "bad member header"),
    "long-name-before-nothing": Archive(lambda: behind(long_name(b"x.jpg")), "bad member header"),
    # sparse members
    "sparse-gnu": Archive(lambda: behind(old_sparse(0)), "sparse member x.jpg"),
    "sparse-gnu-chain": Archive(lambda: behind(old_sparse(5000)), "sparse member x.jpg"),
    "sparse-pax-0.0": Archive(
        lambda: behind(pax({"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}), header()),
        "sparse member",
    ),
    "sparse-pax-0.1": Archive(
        lambda: behind(pax({"GNU.sparse.map": "0," * 9999 + "1"}), header()), "sparse member"
    ),
    "sparse-pax-1.0": Archive(
        lambda: behind(
            pax(
                {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": "s.jpg",
                    "GNU.sparse.realsize": "-5",
                }
            ),
            member("x.jpg", b"999999999\n"),
        ),
        "sparse member s.jpg",
    ),
    # no tar
    "gzip": Archive(
        lambda: gzip.compress(tar_bytes(SOUND), mtime=0), "compressed with gzip; unpack it first"
    ),
    "bzip2": Archive(lambda: bz2.compress(tar_bytes(SOUND)), "compressed with bzip2"),
    "xz": Archive(lambda: lzma.compress(tar_bytes(SOUND)), "compressed with xz"),
    "zstd": Archive(lambda: b"\x28\xb5\x2f\xfd" + bytes(2000), "compressed with zstd"),
    "picture": Archive(lambda: IMAGES["a"] + bytes(2000), "not a tar archive"),
    "html": Archive(lambda: b"<html>404</html>" * 100, "not a tar archive"),
}


def patched_name(name: bytes) -> bytes:
    """A member whose name is these bytes, whatever encoding they are in."""
    block = bytearray(header("x" * len(name), len(IMAGES["a"])))
    block[: len(name)] = name
    return checked(block) + padded(IMAGES["a"])
