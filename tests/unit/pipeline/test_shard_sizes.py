"""Sizes by listing, by asking, and of shards that are not there."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.records import Shard
from pipeline.shard_sizes import MOST_FOLDERS, shard_sizes
from pipeline.storage import Storage
from tests.s3 import S3Server


def shards(*urls: object) -> list[Shard]:
    return [Shard(str(url), str(number)) for number, url in enumerate(urls)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        path = tmp_path / f"part{number}" / "a.tar"
        path.parent.mkdir()
        path.write_bytes(bytes(10 + number))
    return tmp_path


def test_local_shards_in_their_order(folder: Path) -> None:
    urls = [folder / f"part{n}/a.tar" for n in (2, 0, 1)]
    assert shard_sizes(shards(*urls), Storage()) == [12, 10, 11]


def test_what_is_not_there_has_no_size(folder: Path) -> None:
    found = shard_sizes(shards(folder / "part0/a.tar", folder / "none/b.tar"), Storage())
    assert found == [10, None]


def test_many_folders_are_listed_from_above(tmp_path: Path) -> None:
    urls = []
    for number in range(MOST_FOLDERS + 1):
        path = tmp_path / f"{number:02}" / "a.tar"
        path.parent.mkdir()
        path.write_bytes(bytes(number))
        urls.append(path)
    listed: list[str] = []

    class Listing(Storage):
        def list_files(self, folder: str) -> dict[str, int]:
            listed.append(folder)
            return super().list_files(folder)

    assert shard_sizes(shards(*urls), Listing()) == list(range(MOST_FOLDERS + 1))
    assert listed == [str(tmp_path)]


def test_a_folder_below_another_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "x.tar").write_bytes(b"12")
    (tmp_path / "a/y.tar").write_bytes(b"123")
    assert shard_sizes(shards(tmp_path / "x.tar", tmp_path / "a/y.tar"), Storage()) == [2, 3]


def test_s3_shards(s3: S3Server) -> None:
    url = s3.make_bucket("sizes", {"d/a.tar": b"123", "d/b.tar": b"1234"})
    found = shard_sizes(
        shards(f"{url}/d/b.tar", f"{url}/d/a.tar", f"{url}/d/c.tar"), Storage(s3.options)
    )
    assert found == [4, 3, None]


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    found = shard_sizes(shards("s3://no-such-bucket-9/a.tar"), Storage(s3.options))
    assert found == [None]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_http_shards_are_asked_for(server: str) -> None:
    urls = [f"{server}/part1/a.tar", f"{server}/part9/a.tar"]
    assert shard_sizes(shards(*urls), Storage()) == [11, None]
