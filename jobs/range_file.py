"""An object on any storage as a seekable file that fetches only what is read."""

from __future__ import annotations

import io

from pipeline.storage import Storage


class RangeFile(io.RawIOBase):
    """Each read is one request: to be used by readers that know what they want, as Parquet's."""

    def __init__(self, url: str, size: int, storage: Storage) -> None:
        self._url = url
        self._size = size
        self._storage = storage
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        data = self._storage.read_range(self._url, self._at, self._at + wanted)
        self._at += len(data)
        return data
