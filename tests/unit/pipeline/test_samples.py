"""Members become samples as in WebDataset; each one is a row or a reject with a reason."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys

from pipeline import samples as samples_module
from pipeline import tar_stream
from pipeline.samples import GroupRow, read_samples, split_name
from pipeline.tar_stream import Member
from tests.builders import picture, samples, tar_bytes, write_tar
from tests.stages import read_shard

NAMES = st.text(alphabet="ab./_éJ猫 -", min_size=1, max_size=12)
IMAGE = picture(40, 30)


def rows(groups: list[GroupRow]) -> list[dict[str, Any]]:
    return [row for group in groups for row in group.samples.to_pylist()]


def rejects(groups: list[GroupRow]) -> list[tuple[str, int, str, str]]:
    """(key, sample_index, member, error) of each; all of stage `read`."""
    found = [row for group in groups for row in group.rejects.to_pylist()]
    assert all(row["stage"] == "read" and row["message"] for row in found)
    return [(r["key"], r["sample_index"], r["member"], r["error"]) for r in found]


def read_members(path: Path, *members: tuple[str, bytes], **options: Any) -> list[GroupRow]:
    return read_shard(write_tar(path / "s.tar", members), **options)


@settings(max_examples=1000, deadline=None)
@given(name=NAMES)
def test_keys_are_those_of_webdataset(name: str) -> None:
    key, extension = base_plus_ext(name)
    expected = None if key is None else (key, extension.lower())
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000000000.jpg", ("000000000", "jpg")),
        ("a.b/c.d/0.left.JPG", ("a.b/c.d/0", "left.jpg")),
        ("./0.jpg", ("./0", "jpg")),
        ("0.", ("0", "")),
        ("folder/no-extension", None),
        (".hidden", None),
    ],
)
def test_keys(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


@settings(max_examples=300, deadline=None)
@given(names=st.lists(NAMES, max_size=12))
def test_groups_are_those_of_webdataset(names: list[str]) -> None:
    ours = list(read_samples((Member(name, 1, b"x") for name in names), frozenset({"jpg"})))
    files = [{"fname": name, "data": b"x", "__url__": "u"} for name in names]
    theirs: list[dict[str, Any]] = []
    try:
        theirs.extend(group_by_keys(files))
    except ValueError:  # a name twice; webdataset ends there
        assert any(sample.duplicate for sample in ours)
        return
    assert not any(sample.duplicate for sample in ours)
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    assert [set(sample.members) for sample in ours] == [
        {key for key in sample if key not in ("__key__", "__url__")} for sample in theirs
    ]
    assert [sample.index for sample in ours] == list(range(len(theirs)))


def test_img2dataset_archives_are_read(tmp_path: Path) -> None:
    members = samples(3, seed=5)
    groups = read_members(tmp_path, *members)
    (group,) = groups
    assert [row["key"] for row in rows(groups)] == ["0000", "0001", "0002"]
    assert [row["member"] for row in rows(groups)] == ["0000.jpg", "0001.jpg", "0002.jpg"]
    assert [row["data"] for row in rows(groups)] == [members[i][1] for i in (0, 3, 6)]
    end = group.head.end
    assert end is not None
    assert (end.samples, end.failure, end.truncated_at) == (3, None, None)
    assert end.size == (tmp_path / "s.tar").stat().st_size


def test_the_first_image_key_that_is_there_is_taken(tmp_path: Path) -> None:
    groups = read_members(
        tmp_path,
        ("0.PNG", b"png"),
        ("0.JPG", b"jpg"),
        ("1.png", b"png"),
        ("2.seg.jpg", b"no"),
        image_key=("jpg", "png"),
    )
    assert [(row["member"], row["data"]) for row in rows(groups)] == [
        ("0.JPG", b"jpg"),
        ("1.png", b"png"),
    ]
    assert rejects(groups) == [("2", 2, "", "no-image")]
    only = read_members(tmp_path, ("2.seg.jpg", b"yes"), image_key=("seg.jpg",))
    assert [row["data"] for row in rows(only)] == [b"yes"]


def test_what_has_no_image_is_a_reject_that_says_what_it_has(tmp_path: Path) -> None:
    groups = read_members(tmp_path, ("0.txt", b"x"), ("0.json", b"{}"), ("1.jpg", IMAGE))
    assert rejects(groups) == [("0", 0, "", "no-image")]
    assert "it has json, txt" in groups[0].rejects["message"][0].as_py()
    assert [row["sample_index"] for row in rows(groups)] == [1]


def test_a_member_twice_is_a_reject(tmp_path: Path) -> None:
    groups = read_members(tmp_path, ("0.jpg", b"a"), ("0.JPG", b"b"), ("1.jpg", b"c"))
    assert rejects(groups) == [("0", 0, "0.JPG", "duplicate-member")]
    assert [row["key"] for row in rows(groups)] == ["1"]


def test_a_key_that_comes_again_later_is_another_sample(tmp_path: Path) -> None:
    groups = read_members(tmp_path, ("0.jpg", b"a"), ("1.jpg", b"b"), ("0.jpg", b"c"))
    assert [(row["key"], row["sample_index"]) for row in rows(groups)] == [
        ("0", 0),
        ("1", 1),
        ("0", 2),
    ]


def test_an_image_too_large_to_hold_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_stream, "MAX_MEMBER_BYTES", 10)
    groups = read_members(
        tmp_path, ("0.jpg", b"x" * 11), ("1.jpg", b"x"), ("1.txt", b"y" * 11), carry=("txt",)
    )
    assert rejects(groups) == [
        ("0", 0, "0.jpg", "oversized"),
        ("1", 1, "1.jpg", "oversized"),
    ], "a caption that is there is never null"
    assert rows(groups) == []


def test_members_are_carried(tmp_path: Path) -> None:
    groups = read_members(
        tmp_path,
        ("0.jpg", IMAGE),
        ("0.txt", "Katze 猫".encode()),
        ("0.json", b'{"url": "u", "width": 3, "tags": ["a"], "none": null}'),
        ("0.npy", b"\x00\x01\xff\x00"),
        ("1.jpg", IMAGE),
        ("1.TXT", b"caf\xe9"),
        ("1.json", b"{not json"),
        ("2.jpg", IMAGE),
        ("2.json", b"[1]"),
        carry=("txt", "json:url", "json:width", "json:tags", "json:none", "npy"),
    )
    names = ("txt", "json:url", "json:width", "json:tags", "json:none", "npy")
    assert [tuple(row[name] for name in names) for row in rows(groups)] == [
        ("Katze 猫", "u", "3", '["a"]', None, b"\x00\x01\xff\x00"),
        ("caf\ufffd", None, None, None, None, None),
        (None, None, None, None, None, None),
    ]


def test_members_that_have_no_key_belong_to_no_sample(tmp_path: Path) -> None:
    groups = read_members(
        tmp_path, ("0.jpg", IMAGE), ("README", b"x"), ("0.txt", b"t"), carry=("txt",)
    )
    assert [(row["key"], row["txt"]) for row in rows(groups)] == [("0", "t")]


def test_keys_in_any_script_and_any_bytes(tmp_path: Path) -> None:
    sink = io.BytesIO()
    names = ["d.é/猫.jpg", b"d/caf\xe9.jpg".decode("utf-8", "surrogateescape")]
    with tarfile.open(fileobj=sink, mode="w", errors="surrogateescape") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
    path = tmp_path / "s.tar"
    path.write_bytes(sink.getvalue())
    assert [row["key"] for row in rows(read_shard(path))] == ["d.é/猫", "d/caf\\xe9"]


def test_groups_are_bounded_in_number_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "GROUP_SAMPLES", 4)
    members = [(f"{i:02}.jpg", b"x" * 10) for i in range(10)]
    members[5] = ("05.txt", b"no image")
    groups = read_members(tmp_path, *members)
    assert [[r["sample_index"] for r in g.samples.to_pylist()] for g in groups] == [
        [0, 1, 2, 3],
        [4, 6, 7],
        [8, 9],
    ]
    assert [group.head.group for group in groups] == [0, 1, 2]
    assert [group.head.end is None for group in groups] == [True, True, False]
    monkeypatch.setattr(samples_module, "GROUP_BYTES", 25)
    groups = read_members(tmp_path, *members)
    assert [len(rows([group])) for group in groups] == [3, 3, 3]


def test_a_group_survives_its_way_as_a_row(tmp_path: Path) -> None:
    (group,) = read_members(tmp_path, ("0.jpg", IMAGE), ("1.txt", b"x\0"), carry=("txt",))
    again = GroupRow.load(group.dump())
    assert again.head == group.head
    assert again.samples.equals(group.samples)
    assert again.rejects.equals(group.rejects)


def test_an_empty_archive_is_a_shard_of_no_samples(tmp_path: Path) -> None:
    (group,) = read_members(tmp_path)
    assert group.head.end is not None
    assert (group.head.end.samples, group.head.end.failure) == (0, None)


def test_a_broken_shard_ends_with_the_reason_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "GROUP_SAMPLES", 2)
    path = write_tar(tmp_path / "s.tar", samples(5))
    path.write_bytes(path.read_bytes()[:-12_000])
    *before, last = read_shard(path)
    assert before
    assert last.samples.num_rows == last.rejects.num_rows == 0
    end = last.head.end
    assert end is not None
    assert end.failure is not None
    assert end.failure.startswith(f"{path}: ")
    assert f"at byte {path.stat().st_size}" in end.failure


def test_a_shard_that_is_not_there_ends_with_the_reason(tmp_path: Path) -> None:
    (group,) = read_shard(tmp_path / "none.tar")
    assert group.head.end is not None
    assert str(group.head.end.failure).startswith("FileNotFoundError: ")


MEMBERS = [
    (f"{i:03}.{extension}", content)
    for i in range(3)
    for extension, content in (("jpg", bytes([i]) * 700), ("txt", b"t" * (511 + i)))
]
ARCHIVE = tar_bytes(MEMBERS)


def test_of_a_cut_shard_the_whole_samples_are_taken(tmp_path: Path) -> None:
    """At every 256th byte: samples before the open one are rows, the open one is a reject."""
    path = tmp_path / "s.tar"
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
        headers = [entry.offset for entry in archive.getmembers()]
    seen = set()
    for cut in range(512, len(ARCHIVE) + 1, 256):
        path.write_bytes(ARCHIVE[:cut])
        groups = read_shard(path, accept_truncated=True)
        end = groups[-1].head.end
        assert end is not None
        assert end.failure is None, cut
        keys = [row["key"] for row in rows(groups)]
        begun = sum(header + 512 <= cut for header in headers[::2])
        whole = end.truncated_at is None
        assert whole == (cut >= content_end() + 512), cut
        expected = [f"{i:03}" for i in range(begun)]
        assert keys == (expected if whole else expected[:-1]), cut
        assert [key for key, *_ in rejects(groups)] == ([] if whole else expected[-1:]), cut
        assert {code for *_, code in rejects(groups)} <= {"truncated"}
        assert end.samples == begun
        strict = read_shard(path)[-1].head.end
        assert strict is not None
        assert (strict.failure is None) == whole
        seen.add((begun, whole))
    assert seen == {(1, False), (2, False), (3, False), (3, True)}


def content_end() -> int:
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_a_damaged_shard_is_not_taken_for_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    data = bytearray(ARCHIVE)
    data[4096 + 3] ^= 1
    path.write_bytes(data)
    end = read_shard(path, accept_truncated=True)[-1].head.end
    assert end is not None
    assert end.failure is not None
