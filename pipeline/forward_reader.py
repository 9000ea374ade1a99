"""A remote object as a file that only goes forward, and a check of all its bytes at the end."""

from __future__ import annotations

import io
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.checksums import CompositeMd5, DamagedObjectError
from pipeline.local_files import BLOCK_BYTES
from pipeline.storage import FileInfo, Storage, redact

logger = logging.getLogger(__name__)


class ForwardReader(io.RawIOBase):
    """Fetched in blocks by range, the next one ahead of time.

    A range request that breaks is asked for again by the storage layer, so reading goes on at the
    byte where the connection broke. All blocks are of the one version that `info` names. Where the
    store gives a checksum every block is fetched and digested, else those that are asked for.
    """

    def __init__(self, url: str, storage: Storage, info: FileInfo) -> None:
        self._url = url
        self._storage = storage
        self._info = info
        self.num_bytes = info.size
        self._position = 0
        self._block = b""
        self._block_start = -BLOCK_BYTES  # the first block follows
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._closed = threading.Event()
        self._digest = storage.digest(url, info)
        self.last_read = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        assert offset >= self._position, "this reader only goes forward"
        self._position = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; fewer only at the end of the object."""
        end = (
            self.num_bytes
            if size is None or size < 0
            else min(self._position + size, self.num_bytes)
        )
        pieces = []
        while self._position < end:
            start = self._position - self._block_start
            if not 0 <= start < len(self._block):
                self._advance()
                start = self._position - self._block_start
            piece = self._block[start : start + end - self._position]
            pieces.append(piece)
            self._position += len(piece)
        self.last_read = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self.last_read

    def check(self) -> None:
        """Reads what is left and compares all with the store's checksum, if there is one.

        Raises:
            DamagedObjectError: it is not what the store has.
        """
        checksum = self._info.checksum
        if self._digest is None or checksum is None:
            return
        while (following := self._block_start + BLOCK_BYTES) < self.num_bytes:
            self._fetch(following)
        found = self._digest.hexdigest()
        if found == checksum.expected:
            return
        if isinstance(self._digest, CompositeMd5) and not self._storage.parts_are_even(
            self._url, self._info, self._digest.part_bytes
        ):
            logger.warning(
                "%s: uploaded in parts of different sizes, so its checksum says nothing",
                redact(self._url),
            )
            return
        raise DamagedObjectError(
            f"{redact(self._url)}: damaged on the way: what came has {checksum.algorithm} {found}, "
            f"the store has {checksum.expected}"
        )

    def close(self) -> None:
        self._closed.set()  # Python ends when the pool has: no retries that nobody waits for
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _advance(self) -> None:
        """Fetches the block of the position; those before it, too, where all are digested."""
        wanted = self._position // BLOCK_BYTES * BLOCK_BYTES
        if self._digest is None:
            self._fetch(wanted)
        while self._block_start < wanted:
            self._fetch(self._block_start + BLOCK_BYTES)

    def _fetch(self, start: int) -> None:
        if self._ahead is not None and self._ahead[0] == start:
            self._block = self._ahead[1].result()
        else:
            self._block = self._request(start)
        self._block_start = start
        following = start + BLOCK_BYTES
        self._ahead = None
        if following < self.num_bytes:
            self._ahead = (following, self._pool.submit(self._request, following))
        if self._digest is not None:
            self._digest.update(self._block)

    def _request(self, start: int) -> bytes:
        end = min(start + BLOCK_BYTES, self.num_bytes)
        return self._storage.read_range(self._url, start, end, self._info.etag, self._closed)
