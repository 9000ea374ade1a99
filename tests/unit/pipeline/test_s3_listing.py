"""Listings of many pages against a real server: whole, page by page, each page tried by itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError

from pipeline import retries
from pipeline.s3_listing import _parse_date, list_objects, list_side_by_side
from pipeline.storage import Storage
from tests.s3 import S3_SERVERS, S3Server

COUNT = 2100  # three pages
NAMES = [f"{number // 700}/é {number:05d}.tar" for number in range(COUNT)]


@pytest.fixture(scope="module", params=S3_SERVERS)
def filled(
    request: pytest.FixtureRequest, s3_server: Callable[[str], S3Server]
) -> tuple[Storage, str]:
    server = s3_server(request.param)
    bucket = f"listing-{secrets.token_hex(4)}"
    url = server.make_bucket(bucket, {"in/": b"", "in/0/": b"", "inside/x.tar": b"1"})
    client = server.client()

    def put(name: str) -> None:
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=b"22")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, NAMES))
    return Storage(server.options), url


@pytest.fixture
def pages(filled: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options of each page that is asked for."""
    fs, _ = filled[0].open(filled[1])
    asked: list[Any] = []
    real = fs.call_s3

    def call_s3(method: str, **options: Any) -> Any:
        assert method == "list_objects_v2"
        asked.append(options)
        return real(method, **options)

    monkeypatch.setattr(fs, "call_s3", call_s3)
    return asked


def test_every_name_of_every_page(filled: tuple[Storage, str], pages: list[Any]) -> None:
    storage, url = filled
    assert sorted(storage.iter_files(f"{url}/in")) == sorted(NAMES)
    assert len(pages) == 3
    assert storage.list_files(f"{url}/in/") == dict.fromkeys(NAMES, 2)


def test_pages_come_as_they_are_asked_for(filled: tuple[Storage, str], pages: list[Any]) -> None:
    storage, url = filled
    names = storage.iter_files(f"{url}/in")
    assert next(names) == NAMES[0]
    assert len(pages) == 1


@pytest.mark.parametrize(
    "bounds",
    [
        [],
        ["0/é 00000.tar"],
        ["1/", "1/é 00700.tar", "1/é 00701", "9"],
        ["", "0", "2/é 02099.tar", "2/é 02099.tar"],
    ],
)
def test_runs_side_by_side_make_the_whole(
    filled: tuple[Storage, str], pages: list[Any], bounds: list[str]
) -> None:
    storage, url = filled
    names = storage.list_names(f"{url}/in", bounds)
    assert sorted(names) == sorted(NAMES)  # each once
    assert len(pages) >= len(bounds) + 1
    assert storage.list_names(f"{url}/nothing", bounds) == []
    assert storage.list_names(f"{url}-missing/in", bounds) == []


def test_a_page_that_breaks_is_asked_for_again_by_itself(
    filled: tuple[Storage, str], pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, url = filled
    fs, _ = storage.open(url)
    counting = fs.call_s3
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=lambda seconds: None))

    def breaking(method: str, **options: Any) -> Any:
        answer = counting(method, **options)
        if len(pages) == 2:
            raise ConnectionClosedError(endpoint_url="http://broken")
        return answer

    monkeypatch.setattr(fs, "call_s3", breaking)
    assert sorted(storage.iter_files(f"{url}/in")) == sorted(NAMES)
    tokens = [options.get("ContinuationToken") for options in pages]
    assert len(tokens) == 4
    assert tokens[0] is None
    assert tokens[1] == tokens[2] != tokens[3]


def test_a_listing_cut_short_is_an_error() -> None:
    page = {"IsTruncated": True, "Contents": [{"Key": "a", "Size": 1}]}
    with pytest.raises(OSError, match="breaks its listing off"):
        list(list_objects(lambda **options: page, "bucket", ""))
    page["NextContinuationToken"] = "same"
    with pytest.raises(OSError, match="breaks its listing off"):
        list(list_objects(lambda **options: page, "bucket", ""))


def test_globs_look_no_deeper_than_they_ask(filled: tuple[Storage, str], pages: list[Any]) -> None:
    storage, url = filled
    assert storage.glob(f"{url}/in/*.tar") == []
    assert storage.glob(f"{url}/in*/x.tar") == [f"{url}/inside/x.tar"]
    assert len(pages) == 1 + 3  # no page of the 2100 objects in `in`'s folders
    found = [f"{url}/in/{name}" for name in NAMES if name.startswith("1/é 0070")]
    assert storage.glob(f"{url}/in/1/é 0070?.tar") == sorted(found)
    assert pages[-1]["Prefix"] == "in/1/é 0070"
    assert len(storage.glob(f"{url}/in/**/*.tar")) == COUNT
    assert len(storage.glob(f"{url}/**/*.tar")) == COUNT + 1


def test_a_directory_bucket_is_listed_in_one_run() -> None:
    assert list_side_by_side(["a", "b"], "bucket") == [("", "a"), ("a", "b"), ("b", None)]
    assert list_side_by_side(["a", "b"], "bucket--use1-az4--x-s3") == [("", None)]


def test_dates_of_every_form_are_read() -> None:
    moment = datetime(2026, 11, 24, 9, 8, 7, tzinfo=UTC)
    for text in ("2026-11-24T09:08:07.000Z", "Tue, 24 Nov 2026 09:08:07 GMT", "1795511287"):
        assert _parse_date(text) == moment
