"""Reading an object in several attempts, of which one that was given up goes on."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from fsspec.asyn import get_loop
from fsspec.exceptions import FSTimeoutError

from pipeline.s3 import Download

DATA = bytes(range(200))


class Body:
    """An answer's body, in one piece."""

    def __init__(self, ended: asyncio.Event) -> None:
        self._left, self._ended = [DATA], ended

    async def __aenter__(self) -> Body:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()

    async def read(self, size: int) -> bytes:
        return self._left.pop() if self._left else b""


class LateStore:
    """Answers the first request, which cannot be stopped, in the middle of the second."""

    loop = get_loop()

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self._second, self._first_ended = asyncio.Event(), asyncio.Event()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def _call_s3(self, method: str, **request: Any) -> dict[str, Any]:
        self.requests.append(request)
        first = len(self.requests) == 1
        while first and not self._second.is_set():
            try:
                await self._second.wait()
            except asyncio.CancelledError:
                continue
        if not first:
            self._second.set()
            await self._first_ended.wait()
        etag = hashlib.md5(DATA).hexdigest()
        return {"ContentLength": len(DATA), "ETag": f'"{etag}"', "Body": Body(self._first_ended)}


def test_an_answer_that_comes_too_late_changes_nothing_for_the_next_request() -> None:
    store = LateStore()
    download = Download(store, "bucket/key")  # type: ignore[arg-type]
    with pytest.raises(FSTimeoutError):
        download.attempt(timeout=0.01)
    assert download.attempt(timeout=60) == DATA
    assert ["Range" in request for request in store.requests] == [False, False]
