"""A shard is read to its end, or it is said where it breaks; nothing short passes for whole."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline import forward_reader, tar_stream
from pipeline.tar_stream import BrokenShardError, Member, read_members
from tests.builders import tar_bytes
from tests.stages import STORAGE

BLOCK = 512
MEMBERS = [
    ("000.jpg", b"\xff" * 700),
    ("000.txt", b"a caption"),
    ("001.jpg", b"\xee" * 512),  # ends at a block's edge
    ("001.txt", b""),
    ("002.jpg", b"\xdd" * 1300),
]
LONG = [(f"{'folder/' * 20}{name}", content) for name, content in MEMBERS]
ARCHIVES = {
    "ustar": tar_bytes(MEMBERS),
    "gnu-long": tar_bytes(LONG, tarfile.GNU_FORMAT),
    "pax-long": tar_bytes(LONG, tarfile.PAX_FORMAT),
}


def read(path: Path) -> list[Member]:
    return list(read_members(str(path), STORAGE, STORAGE.info(str(path))))


def read_broken(path: Path) -> tuple[list[Member], BrokenShardError]:
    """The members before the break, and what was said of it."""
    members: list[Member] = []
    with pytest.raises(BrokenShardError) as caught:
        members.extend(read_members(str(path), STORAGE, STORAGE.info(str(path))))
    return members, caught.value


def content_end(data: bytes) -> int:
    """Where the end-of-archive mark begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // BLOCK) * BLOCK


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "shard.tar"


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("block_bytes", [8 << 20, 1000])
def test_a_whole_archive_gives_every_member(
    kind: str, block_bytes: int, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_reader, "BLOCK_BYTES", block_bytes)
    shard.write_bytes(ARCHIVES[kind])
    expected = MEMBERS if kind == "ustar" else LONG
    assert read(shard) == [Member(name, len(content), content) for name, content in expected]


@pytest.mark.parametrize("kind", ARCHIVES)
def test_no_cut_passes_for_whole(kind: str, shard: Path) -> None:
    data = ARCHIVES[kind]
    shard.write_bytes(data)
    whole = read(shard)
    end = content_end(data)
    seen = set()
    for cut in range(0, end + BLOCK, 256):
        shard.write_bytes(data[:cut])
        members, error = read_broken(shard)
        assert members == whole[: len(members)], cut
        assert error.cut or members == [], cut
        assert error.offset <= cut
        assert f"{shard}: " in str(error)
        assert str(error).endswith(f" at byte {error.offset}")
        seen.add(len(members))
    assert seen == set(range(len(MEMBERS) + 1))


@pytest.mark.parametrize("end_blocks", [1, 2, 3, 40])
def test_one_end_block_is_enough(end_blocks: int, shard: Path) -> None:
    data = ARCHIVES["ustar"]
    shard.write_bytes(data[: content_end(data)] + bytes(end_blocks * BLOCK))
    assert len(read(shard)) == len(MEMBERS)


def test_data_behind_the_end_is_an_error(shard: Path) -> None:
    shard.write_bytes(ARCHIVES["ustar"] + ARCHIVES["ustar"])
    members, error = read_broken(shard)
    assert len(members) == len(MEMBERS)
    assert "data behind the end-of-archive mark" in str(error)
    assert not error.cut


def test_zeros_amid_the_archive_are_an_error(shard: Path) -> None:
    data = bytearray(ARCHIVES["ustar"])
    data[1536:2048] = bytes(512)  # the header of the second member
    shard.write_bytes(data)
    members, error = read_broken(shard)
    assert len(members) == 1
    assert "data behind the end-of-archive mark" in str(error)
    assert not error.cut


@pytest.mark.parametrize("header", [0, 1536, 2560])
def test_a_damaged_header_is_an_error(header: int, shard: Path) -> None:
    data = bytearray(ARCHIVES["ustar"])
    data[header + 2] ^= 0x20  # in the name: the checksum does not hold
    shard.write_bytes(data)
    members, error = read_broken(shard)
    assert len(members) == {0: 0, 1536: 1, 2560: 2}[header]
    assert error.offset == header
    assert not error.cut
    assert ("not a tar archive" if header == 0 else ": damaged member header at") in str(error)


def test_a_damaged_last_header_is_no_end(shard: Path) -> None:
    """Nothing but zeros follows the header of an empty member."""
    data = bytearray(tar_bytes([("0.jpg", b"x" * 512), ("0.txt", b"")]))
    data[1024 + 2] ^= 0x20
    shard.write_bytes(data)
    members, error = read_broken(shard)
    assert [member.name for member in members] == ["0.jpg"]
    assert str(error).endswith(": damaged member header at byte 1024")


def test_what_is_no_tar_is_an_error(shard: Path) -> None:
    shard.write_bytes(b"<html>not found</html>" * 100)
    members, error = read_broken(shard)
    assert members == []
    assert "not a tar archive" in str(error)


def test_an_object_replaced_while_it_is_read_is_an_error(shard: Path) -> None:
    shard.write_bytes(ARCHIVES["ustar"])
    members = read_members(str(shard), STORAGE, STORAGE.info(str(shard)))
    next(members)
    shard.write_bytes(ARCHIVES["ustar"] + bytes(512))
    with pytest.raises(BrokenShardError, match="replaced while it was read"):
        list(members)


def test_folders_links_and_meta_members_are_passed_over(shard: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("d/0.jpg", tarfile.SYMTYPE)]:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = "x"
            archive.addfile(entry)
        for name in ["__meta__", "__meta__/a.json", "__x.jpg", "d/__in__/0.jpg", "__a__b.jpg"]:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
    shard.write_bytes(sink.getvalue())
    assert [member.name for member in read(shard)] == ["__x.jpg", "d/__in__/0.jpg", "__a__b.jpg"]


def test_a_member_too_large_to_hold_comes_without_its_data(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_stream, "MAX_MEMBER_BYTES", 600)
    shard.write_bytes(ARCHIVES["ustar"])
    sizes = [None if member.data is None else len(member.data) for member in read(shard)]
    assert sizes == [None, 9, 512, 0, None]
    shard.write_bytes(ARCHIVES["ustar"][:1100])  # within the large member
    assert read_broken(shard)[1].cut


def test_names_in_any_bytes_stay_distinct(shard: Path) -> None:
    sink = io.BytesIO()
    names = [b"caf\xe9.jpg", b"caf\xe8.jpg", "café.jpg".encode(), "猫.jpg".encode()]
    with tarfile.open(
        fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT, errors="surrogateescape"
    ) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name.decode("utf-8", "surrogateescape")))
    shard.write_bytes(sink.getvalue())
    found = [member.name for member in read(shard)]
    assert found == ["caf\\xe9.jpg", "caf\\xe8.jpg", "café.jpg", "猫.jpg"]
    assert all(name.encode() for name in found)  # every one can be written as UTF-8
