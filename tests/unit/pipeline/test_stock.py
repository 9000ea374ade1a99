"""What lies in OUTPUT: nothing of a committed shard is ever taken for a stray."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.commits import commit_url
from pipeline.stock import Stock, take_stock
from pipeline.storage import Storage, join
from tests.s3 import S3_SERVERS, S3Server

STORAGE = Storage()
COMMITTED = ["a", "a/c", "n-00007", "v"]
SHARDS = sorted([*COMMITTED, "a/b", "b", "z"])
KEPT = [
    "dataset.json",
    "commits/a.json",
    "commits/a/c.json",
    "commits/n-00007.json",
    "commits/v.json",
    "embeddings/a.parquet",
    "embeddings/a/c-00000.parquet",
    "embeddings/a/c-00001.parquet",
    "embeddings/n-00007.parquet",  # a shard of that name
    "rejects/a.parquet",
    "embeddings/v.parquet",
    "rejects/v.parquet",
    "_runs/lock.json",  # no folder of a run
    "notes/mine.txt",
]
STRAYS = [
    "_runs/r/parts/0/0.arrow",
    "_runs/r/progress.json",
    "commits/z.json.tmp-0123abcd",
    "dataset.json.tmp-0123abcd",
    "embeddings/a.parquet.tmp-89abcdef",
    "embeddings/a/b-00000.parquet",
    "embeddings/a/b.parquet",
    "rejects/b.parquet",
]


class BehindStorage(Storage):
    """Its listing of commits lacks those of one shard, as after a short or stale answer."""

    def list_names(self, folder: str, bounds: Sequence[str]) -> list[str]:
        names = super().list_names(folder, bounds)
        return [n for n in names if not (folder.endswith("/commits") and n == "a/c.json")]


@pytest.fixture(params=["local", *S3_SERVERS])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: Callable[[str], S3Server]
) -> tuple[Storage, str]:
    """A storage and the URL of an OUTPUT with the files above."""
    if request.param == "local":
        storage, output = Storage(), str(tmp_path / "out")
    else:
        server = s3_server(request.param)
        bucket = server.make_bucket(f"stock-{secrets.token_hex(4)}")
        storage, output = Storage(server.options), join(bucket, "out")
    for name in [*KEPT, *STRAYS]:
        storage.publish_bytes(join(output, name), b"x")
    return storage, output


def test_what_is_committed_and_what_is_left_over(place: tuple[Storage, str]) -> None:
    storage, output = place
    stock = take_stock(output, SHARDS, storage)
    runs, files = ["_runs/r"], [name for name in STRAYS if not name.startswith("_runs/")]
    assert stock == Stock(set(COMMITTED), [*runs, *files])
    storage.remove(*(join(output, name) for name in stock.strays))
    assert sorted(storage.list_files(output)) == sorted(KEPT)


def test_an_output_of_nothing(tmp_path: Path) -> None:
    assert take_stock(str(tmp_path / "out"), ["a"], STORAGE) == Stock(set(), [])


def test_a_listing_that_is_behind_condemns_nothing(
    place: tuple[Storage, str], caplog: pytest.LogCaptureFixture
) -> None:
    storage, output = place
    behind = BehindStorage(storage.options)
    stock = take_stock(output, SHARDS, behind)
    assert not [name for name in stock.strays if "a/c" in name]
    assert stock.committed == set(COMMITTED)  # and is not computed again
    assert caplog.messages == [
        f"{output}: the listing of its commits is behind, it lacks a/c and 0 more"
    ]


def test_a_commit_that_cannot_be_looked_up_condemns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    STORAGE.publish_bytes(f"{tmp_path}/embeddings/a.parquet", b"x")
    real = Storage.exists

    def refuse(self: Storage, url: str) -> bool:
        if url == commit_url(str(tmp_path), "a"):
            raise PermissionError("status 403")
        return real(self, url)

    monkeypatch.setattr(Storage, "exists", refuse)
    with pytest.raises(PermissionError):
        take_stock(str(tmp_path), ["a"], STORAGE)


def test_whole_listings_and_no_look_at_single_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:05d}" for number in range(300)]
    for name in names:
        for path in (f"commits/{name}.json", f"embeddings/{name}.parquet"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()

    def fail(self: Storage, url: str) -> bool:
        raise AssertionError(f"{url} was looked up")

    monkeypatch.setattr(Storage, "exists", fail)
    assert take_stock(str(tmp_path), names, STORAGE) == Stock(set(names), [])
