"""What tensor-parallel ranks know of each other without a word: memory that they share, and counts
in it that show who is at work, who hangs and who has stopped."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

BEATS_BYTES = mmap.PAGESIZE


class SharedMemory:
    """Memory of all ranks: the tiles of one call, and two counts of each rank, of its collectives
    and of the rounds of its watching thread."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        if os.fstat(descriptor).st_size < BEATS_BYTES:
            os.ftruncate(descriptor, BEATS_BYTES)
        self._tiles = mmap.mmap(descriptor, BEATS_BYTES)
        beats = mmap.mmap(descriptor, BEATS_BYTES)
        self.beats = np.frombuffer(beats, np.uint64, size)
        self.rounds = np.frombuffer(beats, np.uint64, size, self.beats.nbytes)

    def tiles(self, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
        """uint8 of this shape [n, S, S, 3]; what an earlier call gave is overwritten."""
        num_bytes = int(np.prod(shape))
        if len(self._tiles) < BEATS_BYTES + num_bytes:
            if os.fstat(self.descriptor).st_size < BEATS_BYTES + num_bytes:
                os.ftruncate(self.descriptor, BEATS_BYTES + num_bytes)
            self._tiles = mmap.mmap(self.descriptor, BEATS_BYTES + num_bytes)
        return np.frombuffer(self._tiles, np.uint8, num_bytes, BEATS_BYTES).reshape(shape)


class Pulse:
    """Tells whether ranks that should be at work still make progress."""

    def __init__(self, beats: npt.NDArray[np.uint64]) -> None:
        self._beats = beats
        self._limit: float | None = None
        self._seen: list[int] = []
        self._changed_at = 0.0

    @contextmanager
    def busy(self, limit: float) -> Iterator[None]:
        """Inside, `hung` becomes true when no rank has been heard of for `limit` seconds."""
        self._changed_at, self._limit = time.monotonic(), limit
        try:
            yield
        finally:
            self._limit = None

    def hung(self) -> bool:
        limit, beats = self._limit, self._beats.tolist()
        if beats != self._seen:
            self._seen, self._changed_at = beats, time.monotonic()
        return limit is not None and time.monotonic() - self._changed_at > limit


class Stillness:
    """Tells which ranks have stopped: their watching threads do not go round any more."""

    def __init__(self, rounds: npt.NDArray[np.uint64]) -> None:
        self._rounds = rounds
        self._seen = rounds.tolist()
        self._changed_at = [time.monotonic()] * len(rounds)

    def longer_than(self, limit: float) -> list[int]:
        """Ranks that have begun to go round, and then not for `limit` seconds."""
        moment = time.monotonic()
        for rank, count in enumerate(self._rounds.tolist()):
            if count != self._seen[rank]:
                self._seen[rank], self._changed_at[rank] = count, moment
        return [
            rank
            for rank, count in enumerate(self._seen)
            if count and moment - self._changed_at[rank] > limit
        ]
