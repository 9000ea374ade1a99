"""Pictures from the tars that shards were made from: the right bytes, or why there are none."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import source_pictures
from pipeline.commits import Source
from pipeline.source_pictures import SourceGoneError, SourcePictures
from pipeline.storage import FileInfo, Storage
from tests.builders import picture, sample, tar_bytes, write_tar
from tests.s3 import S3Server

IMAGES = [picture(40, 30, seed=seed) for seed in range(6)]
MEMBERS = [member for n, image in enumerate(IMAGES) for member in sample(f"k{n}", image)]


class CountingStorage(Storage):
    """The bytes of every range that is read."""

    read_bytes = 0

    def read_range(self, url: str, start: int, end: int, *how: Any, **named: Any) -> bytes:
        self.read_bytes += end - start
        return super().read_range(url, start, end, *how, **named)


def source_of(path: Path | str, storage: Storage | None = None) -> Source:
    info: FileInfo = (storage or Storage()).info(str(path))
    return Source(url=str(path), size=info.size, etag=info.etag)


def reader(storage: Storage | None = None, **urls: str) -> SourcePictures:
    return SourcePictures(("jpg", "png"), storage or Storage(), urls)


def why(pictures: SourcePictures, *asked: Any) -> str:
    with pytest.raises(SourceGoneError) as caught:
        pictures.picture(*asked)
    return str(caught.value)


def test_the_picture_of_a_sample(tmp_path: Path) -> None:
    source = source_of(write_tar(tmp_path / "s.tar", MEMBERS))
    pictures = reader()
    for index in (4, 0, 5, 2):
        assert pictures.picture("s", source, index, f"k{index}") == IMAGES[index]


def test_the_preferred_extension_as_when_it_was_embedded(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", b"second"), ("a.jpg", b"first")])
    assert reader().picture("s", source_of(path), 0, "a") == b"first"


def test_what_was_passed_is_not_read_again(tmp_path: Path) -> None:
    source = source_of(write_tar(tmp_path / "s.tar", MEMBERS))
    storage = CountingStorage()
    pictures = reader(storage)
    pictures.picture("s", source, 4, "k4")
    read = storage.read_bytes
    assert read > 0
    for index in range(5):
        assert pictures.picture("s", source, index, f"k{index}") == IMAGES[index]
    assert storage.read_bytes == read
    pictures.picture("s", source, 5, "k5")
    assert storage.read_bytes == 2 * read


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = source_pictures.ENTRY_BYTES + 2
    room = len(IMAGES[4]) + len(IMAGES[5]) + 2 * entry
    monkeypatch.setattr(source_pictures, "MAX_CACHED_BYTES", room)
    source = source_of(write_tar(tmp_path / "s.tar", MEMBERS))
    storage = CountingStorage()
    pictures = reader(storage)
    pictures.picture("s", source, 5, "k5")
    assert pictures._cached_bytes == room
    assert list(pictures._cached) == [("s", source, 4), ("s", source, 5)]
    read = storage.read_bytes
    assert pictures.picture("s", source, 4, "k4") == IMAGES[4]
    assert storage.read_bytes == read
    assert pictures.picture("s", source, 0, "k0") == IMAGES[0]
    assert storage.read_bytes == 2 * read


def test_many_threads_get_each_its_own(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", MEMBERS) for name in "abc"]
    pictures = reader()
    asked = [(path, index) for path in paths for index in range(6)] * 3

    def read(what: tuple[Path, int]) -> bytes:
        path, index = what
        return pictures.picture(path.stem, source_of(path), index, f"k{index}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, asked)) == [IMAGES[index] for _, index in asked]


def test_a_source_that_is_not_what_it_was(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    source = source_of(path)
    gone = Source(url=str(tmp_path / "none.tar"), size=9, etag=None)
    assert why(reader(), "s", gone, 0, "k0") == "its shard is not there any more"
    assert why(reader(), "s", source, 0, "other") == "its shard has no such picture"
    assert why(reader(), "s", source, 6, "k6") == "its shard has no such picture"
    os.utime(path, (1, 1))
    assert why(reader(), "s", source, 0, "k0") == "its shard has changed since it was embedded"
    path.write_bytes(b"no tar" * 300)
    broken = source_of(path)
    assert "not a tar archive" in why(reader(), "s", broken, 0, "k0")


def test_a_source_embedded_again_is_another_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    old = source_of(path)
    pictures = reader()
    assert pictures.picture("s", old, 1, "k1") == IMAGES[1]
    members = [m for n, image in enumerate(IMAGES[::-1]) for m in sample(f"k{n}", image)]
    os.utime(write_tar(path, members), (1, 1))
    new = source_of(path)
    assert new != old
    assert pictures.picture("s", new, 1, "k1") == IMAGES[4]


def test_a_sample_without_a_picture(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"words"), *MEMBERS])
    assert why(reader(), "s", source_of(path), 0, "a") == "its shard has no such picture"
    assert reader().picture("s", source_of(path), 1, "k0") == IMAGES[0]


def test_a_shard_that_has_moved(tmp_path: Path) -> None:
    """A copy has a time of its own; its size must be that of the commit."""
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    source = source_of(path)
    moved = tmp_path / "moved.tar"
    moved.write_bytes(path.read_bytes())
    os.utime(moved, (1, 1))
    path.unlink()
    assert reader(s=str(moved)).picture("s", source, 3, "k3") == IMAGES[3]
    write_tar(moved, MEMBERS[:9])
    changed = "its shard has changed since it was embedded"
    assert why(reader(s=str(moved)), "s", source, 3, "k3") == changed


def test_from_s3(s3: S3Server) -> None:
    storage = Storage(s3.options)
    url = s3.make_bucket("sources", {"s.tar": tar_bytes(MEMBERS)}) + "/s.tar"
    source = source_of(url, storage)
    assert reader(storage).picture("s", source, 2, "k2") == IMAGES[2]
    s3.client().put_object(Bucket="sources", Key="s.tar", Body=tar_bytes(MEMBERS[::-1]))
    assert "changed" in why(reader(storage), "s", source, 2, "k2")
