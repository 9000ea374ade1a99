"""S3's listings, page by page: what is kept of a page is what its reader keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

Request = Callable[..., dict[str, Any]]  # one `ListObjectsV2`, tried again by itself


def list_objects(
    request: Request, bucket: str, prefix: str, **which: Any
) -> Iterator[tuple[str, int]]:
    """Key and size of the objects that `list_entries` finds."""
    for entry in list_entries(request, bucket, prefix, **which):
        yield entry["Key"], entry["Size"]


def list_entries(
    request: Request,
    bucket: str,
    prefix: str,
    depth: int | None = None,
    after: str = "",
    until: str | None = None,
) -> Iterator[dict[str, Any]]:
    """What S3 tells of every object whose key begins with `prefix`, folder markers left out.

    Args:
        depth: levels of folders to look into; 1: no `/` behind the prefix. None: all.
        after: begins with the first key behind this one.
        until: ends with this key. Needs a store that lists in order, and no `depth`.
    """
    assert until is None or depth is None
    folders = [(prefix, depth)]
    while folders:
        folder, levels = folders.pop()
        options = {"Bucket": bucket, "Prefix": folder}
        if levels is not None:
            options["Delimiter"] = "/"
        if after:
            options["StartAfter"] = after
        for page in _pages(request, options):
            for entry in page.get("Contents", ()):
                key = entry["Key"]
                if until is not None and key > until:
                    return
                if not key.endswith("/"):
                    yield entry
            if levels is not None and levels > 1:
                inner = [found["Prefix"] for found in page.get("CommonPrefixes", ())]
                folders += [(name, levels - 1) for name in inner]


def list_side_by_side(bounds: list[str], bucket: str) -> list[tuple[str, str | None]]:
    """The runs (`after`, `until`) between some keys, each of which can be listed by itself.

    A directory bucket (S3 Express) lists in no order and knows no `StartAfter`: one run.
    """
    if bucket.endswith("--x-s3"):
        return [("", None)]
    return list(zip(["", *bounds], [*bounds, None], strict=True))


def _pages(request: Request, options: dict[str, str]) -> Iterator[dict[str, Any]]:
    while True:
        page = request(**options)
        yield page
        if not page.get("IsTruncated"):
            return
        token = page.get("NextContinuationToken")
        if not token or token == options.get("ContinuationToken"):
            raise OSError("the store breaks its listing off: no token to go on with")
        options = {**options, "ContinuationToken": token}


def read_dates_quickly(fs: AbstractFileSystem) -> None:
    """Spares botocore the guessing of date formats: more than half of the time a page takes it.

    Every object of a page has a date; nobody here looks at them.
    """
    factory = fs.session.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=_parse_date)


def _parse_date(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):  # headers have dates of other forms
        from botocore.utils import parse_timestamp  # not for workers that use no S3

        parsed: datetime = parse_timestamp(value)
        return parsed
