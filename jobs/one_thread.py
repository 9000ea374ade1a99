"""A thread of its own for what is to be used by one thread alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

T = TypeVar("T")


class OneThread:
    """Does one thing after another for threads that wait for it, always in the same thread.

    It lives until it is closed: Linux ends a decoder's process together with the thread that
    started it.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._closing = Event()

    def do(self, task: Callable[[], T]) -> T:
        """What comes of the task.

        Raises:
            ConnectionAbortedError: this is closed before the task has begun.
        """
        try:
            done = self._pool.submit(self._do, task)
        except RuntimeError as error:
            if not self._closing.is_set():
                raise
            raise ConnectionAbortedError("closed") from error
        return done.result()

    def close(self, last: Callable[[], None]) -> None:
        """Lets the task that has begun end, gives up those that wait, and does a last one."""
        self._closing.set()
        self._pool.submit(last).result()
        self._pool.shutdown()

    def _do(self, task: Callable[[], T]) -> T:
        if self._closing.is_set():
            raise ConnectionAbortedError("closed")
        return task()
