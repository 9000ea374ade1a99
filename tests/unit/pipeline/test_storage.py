"""Objects appear whole or not at all, faults that can pass are tried again, secrets stay hidden."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import retries
from pipeline import storage as storage_module
from pipeline.retries import ATTEMPTS, FIRST_PAUSE_SECONDS
from pipeline.storage import Storage, StorageError, explained, redact
from tests.faulty_server import FaultyServer
from tests.s3 import S3_SERVERS, S3Server

DATA = bytes(range(256)) * 40


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    made: list[float] = []
    # Its name for the module, not the module itself: other threads do sleep.
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=made.append))
    return made


def test_temporaries_of_killed_writers_are_removed(tmp_path: Path) -> None:
    """As a finalize task leaves them that dies while it writes: the next has other names."""
    kept = ["embeddings/a.parquet", "embeddings/b.tmp-1/c.parquet", "x.tmp-0123456g"]
    for name in [*kept, "embeddings/a.parquet.tmp-01ab45ef", "commits/a.json.tmp-00000000"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    Storage().remove_temporaries(str(tmp_path))
    assert sorted(Storage().list_files(str(tmp_path))) == sorted(kept)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(DATA) as running:
        yield running


@pytest.fixture(params=["local", *S3_SERVERS])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: Callable[[str], S3Server]
) -> tuple[Storage, str]:
    """A storage and an empty folder on it."""
    if request.param == "local":
        return Storage(), str(tmp_path / "place")
    server = s3_server(request.param)
    return Storage(server.options), server.make_bucket(f"place-{secrets.token_hex(4)}")


class TestEveryStorage:
    def test_what_was_published_is_read_back(
        self, place: tuple[Storage, str], tmp_path: Path
    ) -> None:
        storage, folder = place
        local = tmp_path / "finished"
        local.write_bytes(DATA)
        storage.publish_bytes(f"{folder}/a/one.bin", b"first")
        storage.publish_bytes(f"{folder}/a/one.bin", b"second")
        storage.publish_file(f"{folder}/a/b/two.bin", local)
        assert storage.read(f"{folder}/a/one.bin") == b"second"
        assert storage.read(f"{folder}/a/b/two.bin") == DATA
        assert storage.read_range(f"{folder}/a/b/two.bin", 255, 258) == b"\xff\x00\x01"
        assert storage.info(f"{folder}/a/b/two.bin").size == len(DATA)
        assert storage.list_files(folder) == {"a/one.bin": 6, "a/b/two.bin": len(DATA)}

    def test_one_of_many_creates(self, place: tuple[Storage, str]) -> None:
        storage, folder = place
        url = f"{folder}/a/lock"

        def create(number: int) -> int | None:
            try:
                storage.create(url, f"{number}".encode())
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            (winner,) = [n for n in pool.map(create, range(8)) if n is not None]
        assert storage.read(url) == f"{winner}".encode()
        assert storage.creates_exclusively(url)

    def test_a_folder_is_listed_flat(self, place: tuple[Storage, str]) -> None:
        storage, folder = place
        assert list(storage.iter_files(f"{folder}/a", depth=1)) == []
        for name in ("a/x", "a/b/y", "a/b/z", "c"):
            storage.publish_bytes(f"{folder}/{name}", b"1")
        assert list(storage.iter_files(f"{folder}/a", depth=1)) == ["x"]
        storage.remove_empty(f"{folder}/a")  # it is not
        assert sorted(storage.iter_files(f"{folder}/a")) == ["b/y", "b/z", "x"]
        storage.remove(f"{folder}/a/b", f"{folder}/a/x")
        storage.remove_empty(f"{folder}/a")
        storage.remove_empty(f"{folder}/a")
        assert list(storage.iter_files(folder)) == ["c"]

    def test_an_etag_changes_with_the_object(self, place: tuple[Storage, str]) -> None:
        storage, folder = place
        storage.publish_bytes(f"{folder}/x", b"1")
        first = storage.info(f"{folder}/x")
        storage.publish_bytes(f"{folder}/x", b"2")
        if not folder.startswith("s3:"):  # many file systems tell times in steps of 4 or 10 ms
            os.utime(f"{folder}/x", ns=(0, 1))
        assert first.etag
        assert storage.info(f"{folder}/x").etag != first.etag

    def test_what_is_not_there(self, place: tuple[Storage, str]) -> None:
        storage, folder = place
        storage.publish_bytes(f"{folder}/a/x", b"1")
        assert storage.exists(f"{folder}/a/x")
        assert not storage.exists(f"{folder}/a/y")
        assert not storage.exists(f"{folder}/a")  # a folder is no object
        assert storage.list_files(f"{folder}/b") == {}
        with pytest.raises(FileNotFoundError, match="a/y is not there"):
            storage.read(f"{folder}/a/y")

    def test_remove_takes_files_and_folders_and_minds_none_that_are_gone(
        self, place: tuple[Storage, str]
    ) -> None:
        storage, folder = place
        for name in ("a/x", "a/y", "b/z", "c"):
            storage.publish_bytes(f"{folder}/{name}", b"1")
        storage.remove(f"{folder}/gone", f"{folder}/a", f"{folder}/gone/too", f"{folder}/c")
        assert storage.list_files(folder) == {"b/z": 1}
        storage.remove(f"{folder}/gone")
        storage.remove()
        assert storage.list_files(folder) == {"b/z": 1}

    @pytest.mark.parametrize("call", ["remove", "remove_objects"])
    def test_a_name_is_no_pattern_where_it_is_removed(
        self, call: str, place: tuple[Storage, str]
    ) -> None:
        storage, folder = place
        strange, others = ["a[1]", "b?", "c*", "d"], ["a1", "bb", "cc", "dd/d", "e[1]"]
        for name in [*strange, *others]:
            storage.publish_bytes(f"{folder}/{name}", b"x")
        getattr(storage, call)(f"{folder}/gone", *(f"{folder}/{name}" for name in strange))
        assert sorted(storage.iter_files(folder)) == others

    def test_many_objects_are_removed_in_few_requests(
        self, place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage, folder = place
        monkeypatch.setattr(storage_module.s3, "DELETED_AT_ONCE", 2)
        for number in range(5):
            storage.publish_bytes(f"{folder}/{number}", b"x")
        storage.remove_objects(*(f"{folder}/{number}" for number in range(4)))
        assert list(storage.iter_files(folder)) == ["4"]

    def test_glob_is_sorted_and_gives_urls_that_open(self, place: tuple[Storage, str]) -> None:
        storage, folder = place
        for name in ("b.tar", "a.tar", "a.txt", "deep/c.tar"):
            storage.publish_bytes(f"{folder}/{name}", name.encode())
        found = storage.glob(f"{folder}/*.tar")
        assert found == [f"{folder}/a.tar", f"{folder}/b.tar"]
        assert [storage.read(url) for url in found] == [b"a.tar", b"b.tar"]
        assert storage.glob(f"{folder}/**/*.tar") == [*found, f"{folder}/deep/c.tar"]


class TestLocalPublishing:
    def test_file_and_folder_are_synced_before_it_is_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        Storage().publish_bytes(str(tmp_path / "sub/name.json"), DATA)
        assert len(synced) == 2
        assert storage_module.TEMPORARY.search(synced[0])
        assert synced[0].startswith("name.json")
        assert synced[1] == "sub"

    @pytest.mark.parametrize("before", [None, b"the old content"])
    def test_a_write_that_fails_leaves_no_half_file(
        self,
        before: bytes | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
    ) -> None:
        final = tmp_path / "name.json"
        if before is not None:
            final.write_bytes(before)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*name\.json.*No space left.*1 attempts"):
            Storage().publish_bytes(str(final), DATA)
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left == ({} if before is None else {"name.json": before})
        assert pauses == []  # a full disk does not empty itself

    def test_a_fault_that_passes_is_tried_again_after_growing_pauses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        faults = [OSError(errno.EIO, "Input/output error")] * (ATTEMPTS - 1)
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if faults:
                raise faults.pop()
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        Storage().publish_bytes(str(tmp_path / "x"), DATA)
        assert (tmp_path / "x").read_bytes() == DATA
        assert len(pauses) == ATTEMPTS - 1
        for attempt, pause in enumerate(pauses):
            middle = FIRST_PAUSE_SECONDS * 2**attempt
            assert 0.5 * middle <= pause <= 1.5 * middle


FAULTS = ["500", "503", "reset-before", "reset-mid", "short", "half-range", "stall"]


def hurried(fault: str) -> Storage:
    """Waits shortly where nothing else comes; a busy machine may be late there, too."""
    return Storage(deadline_seconds=2.0 if fault == "stall" else 60)


class TestFaultsOfAServer:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_passing_fault_costs_a_logged_attempt(
        self,
        fault: str,
        server: FaultyServer,
        pauses: list[float],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        # aiohttp itself asks once more where a connection broke before an answer
        server.faults = [fault] * (4 if fault == "reset-before" else 2)
        with caplog.at_level(logging.WARNING, "pipeline.retries"):
            assert hurried(fault).read_range(server.url, 1000, 5000) == DATA[1000:5000]
        lines = [record.getMessage() for record in caplog.records]
        if fault == "stall":
            assert server.num_requests >= 3
            assert 2 <= len(lines) < ATTEMPTS
        else:
            assert server.num_requests == (5 if fault == "reset-before" else 3)
            assert len(lines) == 2
        assert len(pauses) == len(lines)
        for attempt, line in enumerate(lines, 1):
            assert line.startswith(f"read at offset 1000 {redact(server.url)}: ")
            assert f"attempt {attempt} of {ATTEMPTS}, next in" in line

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_lasting_fault_ends_in_an_error_after_a_few_requests(
        self, fault: str, server: FaultyServer, pauses: list[float]
    ) -> None:
        server.faults = [fault] * 100
        with pytest.raises(OSError, match=rf"cannot read at offset 0 .*\({ATTEMPTS} attempts\)"):
            hurried(fault).read_range(server.url, 0, 100)
        if fault == "stall":
            assert 1 <= server.num_requests <= ATTEMPTS
        else:
            assert server.num_requests == ATTEMPTS * (2 if fault == "reset-before" else 1)

    def test_a_size_that_cannot_be_told_for_now_is_not_called_missing(
        self, server: FaultyServer, pauses: list[float]
    ) -> None:
        server.faults = ["503"] * 100
        with pytest.raises(OSError, match="503") as caught:
            Storage().info(server.url)
        assert not isinstance(caught.value, FileNotFoundError)
        server.faults = []
        assert Storage().info(server.url).size == len(DATA)

    def test_an_s3_server_that_is_down_is_asked_a_bounded_number_of_times(
        self, server: FaultyServer, pauses: list[float]
    ) -> None:
        server.faults = ["503"] * 1000
        options = {"key": "k", "secret": "hidden-secret", "endpoint_url": server.origin}
        with pytest.raises(OSError, match=r"cannot read at offset 0 s3://bucket/x") as caught:
            Storage(options).read_range("s3://bucket/x", 0, 100)
        assert ATTEMPTS <= server.num_requests <= 20  # s3fs' and botocore's defaults: 125
        assert "hidden-secret" not in str(caught.value)

    def test_a_server_that_ignores_ranges_is_refused(
        self, server: FaultyServer, pauses: list[float]
    ) -> None:
        server.faults = ["ignore-range"]
        with pytest.raises(StorageError, match="ignores byte ranges"):
            Storage().read_range(server.url, 10, 20)
        assert server.num_requests == 1

    @pytest.mark.parametrize(
        ("fault", "kind"), [("404", FileNotFoundError), ("403", PermissionError)]
    )
    def test_what_cannot_pass_is_raised_at_once(
        self, fault: str, kind: type[OSError], server: FaultyServer, pauses: list[float]
    ) -> None:
        storage = Storage()
        server.faults = [fault]
        with pytest.raises(kind):
            storage.read_range(server.url, 0, 10)
        server.faults = [fault] * 2  # HEAD and GET
        with pytest.raises(kind):
            storage.info(server.url)
        assert pauses == []


def test_a_profile_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"s3://b/in: cannot be opened: .*nobody"):
        Storage({"client_kwargs": {"region_name": "eu-north-1"}}).open("s3://b/in")


class TestWords:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("https://me:pass@host:8/a/b.tar?X-Amz-Signature=abc", "https://host:8/a/b.tar"),
            ("http://host/a.tar?token=abc#part", "http://host/a.tar"),
            ("s3://key:secret@bucket/a.tar", "s3://bucket/a.tar"),
            ("s3://bucket/a b?c.tar", "s3://bucket/a b?c.tar"),
            ("/data/a@b?.tar", "/data/a@b?.tar"),
            ("s3://bucket/a#b.tar", "s3://bucket/a#b.tar"),
            ("s3://bucket/a.tar?versionId=7", "s3://bucket/a.tar"),
            ("gs://bucket/a.tar?X-Goog-Signature=abc", "gs://bucket/a.tar"),
            ("simplecache::https://u:pw@h/a.tar?sig=S", "simplecache::https://h/a.tar"),
            ("zip://a.tar::s3://k:s@bucket/a.zip", "zip://a.tar::s3://bucket/a.zip"),
            ("http://[x/out?sig=S", "http://…"),
        ],
    )
    def test_redact(self, url: str, shown: str) -> None:
        assert redact(url) == shown

    @pytest.mark.parametrize("fault", ["404", "403", "500", "reset-before"])
    def test_no_signature_in_logs_and_errors(
        self,
        fault: str,
        server: FaultyServer,
        pauses: list[float],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        server.faults = [fault] * 100
        url = f"{server.url}?X-Amz-Signature=hidden-signature"
        for read in (Storage().read, Storage().info, lambda url: Storage().read_range(url, 0, 9)):
            with pytest.raises(OSError) as caught:
                read(url)
            assert "hidden-signature" not in str(caught.value)
        assert "hidden-signature" not in caplog.text

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (FileNotFoundError("x"), "cannot read s3://b/k: not found; check the bucket"),
            (PermissionError("Forbidden"), "cannot read s3://b/k: access refused (Forbidden);"),
            (PermissionError(None), "cannot read s3://b/k: access refused (PermissionError);"),
            (OSError("down\nfor good"), "cannot read s3://b/k: down for good"),
        ],
    )
    def test_explained(self, error: OSError, line: str) -> None:
        with pytest.raises(StorageError) as caught, explained("read", "s3://me:pw@b/k"):
            raise error
        assert str(caught.value).startswith(line)

    def test_options_do_not_show(self) -> None:
        assert "hidden" not in repr(Storage({"secret": "hidden"}))

    def test_an_unknown_protocol(self) -> None:
        with pytest.raises(StorageError, match="nosuch://x/y: cannot be opened"):
            Storage().open("nosuch://x/y")

    def test_an_endpoint_that_is_no_url(self) -> None:
        options = {"key": "k", "secret": "s", "endpoint_url": "nonsense"}
        with pytest.raises(StorageError, match=r"s3://b/k: cannot be opened: .*Invalid endpoint"):
            Storage(options).read("s3://b/k")
