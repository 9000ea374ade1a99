"""Every kind of hostile archive through the real stages: committed or failed, as it is said."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline import samples, tar_stream
from tests.builders import write_tar
from tests.hostile.archives import ARCHIVES, tiny_members, write_with_huge_member
from tests.hostile.stages import balance, run_stages
from tests.stages import STORAGE, read_shard

SECONDS = 20.0  # of processor time, for one archive; each takes well under one


@pytest.fixture(autouse=True)
def _priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiling lowers the priority of its process, which here is that of the tests."""
    monkeypatch.setattr(os, "setpriority", lambda *_: None)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_ends_as_is_said_of_it(kind: str, tmp_path: Path) -> None:
    archive = ARCHIVES[kind]
    path = tmp_path / "s.tar"
    path.write_bytes(archive.build())
    began = time.process_time()
    outcome = balance(run_stages(path))
    assert time.process_time() - began < SECONDS
    if archive.failure is not None:
        assert outcome.end.failure is not None
        assert outcome.end.failure.startswith(f"{path}: ")
        assert archive.failure in outcome.end.failure
        return
    assert outcome.end.failure is None
    assert tuple(outcome.embedded.values()) == archive.embedded
    assert tuple(outcome.rejects.values()) == archive.rejects
    assert len(archive.embedded) + len(archive.rejects) == outcome.end.samples


def test_json_that_is_no_json_to_arrow(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(ARCHIVES["json-half-surrogate"].build())
    assert balance(run_stages(path)).carried[3] == (None, "?")
    path.write_bytes(ARCHIVES["json-nested-deep"].build())
    assert balance(run_stages(path)).carried[3] == (None, None)


def test_what_nobody_has_thought_of_fails_its_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(samples, "_add", broken)
    path = tmp_path / "s.tar"
    path.write_bytes(ARCHIVES["ustar"].build())
    (chunk,) = run_stages(path)
    assert chunk.head.end is not None
    assert chunk.head.end.failure == "unforeseen in reading: AttributeError: a bug"
    assert "Traceback" in caplog.text
    assert "in broken" in caplog.text


def test_a_hundred_thousand_tiny_members(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(tiny_members(100_000))
    began = time.process_time()
    outcome = balance(run_stages(path))
    assert len(outcome.rejects) == 100_000  # each a sample without a picture
    assert time.process_time() - began < 6 * SECONDS


def test_nothing_is_kept_of_a_member(tmp_path: Path) -> None:
    """As many as there may be: what is held are blocks of the file."""
    path = tmp_path / "s.tar"
    peaks = []
    for count in (2_000, 20_000):
        path.write_bytes(tiny_members(count))
        members = tar_stream.read_members(str(path), STORAGE, STORAGE.info(str(path)))
        tracemalloc.start()
        assert sum(1 for _ in members) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 25 << 20  # two blocks of 8 MiB, and the second's copy


def test_a_member_of_two_gigabytes_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_with_huge_member(path, 2 << 30)
    tracemalloc.start()
    outcome = balance(run_stages(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.rejects == {0: ("huge", "read/oversized")}
    assert list(outcome.embedded.values()) == ["a", "b", "c"]
    assert peak < 64 << 20


def test_a_sample_holds_no_more_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLE_BYTES", 100)
    taken = samples.Sample("k", 0)
    for extension, size in (("jpg", 60), ("png", 60), ("webp", 40)):
        taken.add(extension, tar_stream.Member(f"k.{extension}", size, b"x" * size), True)
    taken.add("txt", tar_stream.Member("k.txt", 500, b"x" * 500), False)
    held = {key: member.data and len(member.data) for key, member in taken.members.items()}
    assert held == {"jpg": 60, "png": None, "webp": 40, "txt": None}
    assert taken.num_bytes == 100


def test_what_is_carried_counts_for_the_size_of_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "GROUP_BYTES", 2000)
    members = [
        member
        for index in range(4)
        for member in ((f"{index}.jpg", b"x" * 10), (f"{index}.txt", b"y" * 1500))
    ]
    groups = read_shard(write_tar(tmp_path / "s.tar", members), carry=("txt",))
    assert [group.samples.num_rows for group in groups] == [2, 2]


def test_the_image_itself_may_be_carried_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_CARRIED_BYTES", 5)
    members = [("0.jpg", b"x" * 10), ("0.txt", b"y" * 5), ("1.jpg", b"x"), ("1.txt", b"y" * 6)]
    (group,) = read_shard(write_tar(tmp_path / "s.tar", members), carry=("jpg", "txt", "json:a"))
    assert group.samples.select(["key", "jpg", "txt"]).to_pylist() == [
        {"key": "0", "jpg": b"x" * 10, "txt": "y" * 5}
    ]
    assert group.rejects["error"].to_pylist() == ["oversized"]
