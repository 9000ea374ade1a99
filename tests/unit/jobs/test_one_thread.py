"""One thing after another, in one thread; what waits when it is closed is given up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.one_thread import OneThread


def test_everything_is_done_in_the_same_thread() -> None:
    thread, seen = OneThread("one"), []
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda _: thread.do(threading.get_ident), range(20)))
    thread.close(lambda: seen.append(threading.get_ident()))
    assert {*threads} == {*seen}
    assert threading.get_ident() not in seen


def test_what_waits_when_it_is_closed_is_given_up() -> None:
    thread, done = OneThread("one"), []
    begun, go = threading.Event(), threading.Event()

    def first() -> str:
        begun.set()
        assert go.wait(30)
        return "first"

    with ThreadPoolExecutor(8) as pool:
        holding = pool.submit(thread.do, first)
        assert begun.wait(30)
        waiting = [pool.submit(thread.do, lambda: done.append("waiting")) for _ in range(5)]
        closing = pool.submit(thread.close, lambda: done.append("last"))
        assert thread._closing.wait(30)
        go.set()
        closing.result(30)
        assert holding.result() == "first"
        for one in waiting:
            with pytest.raises(ConnectionAbortedError):
                one.result(30)
    assert done == ["last"]
    with pytest.raises(ConnectionAbortedError):
        thread.do(lambda: done.append("late"))


def test_an_error_of_a_task_is_the_askers() -> None:
    thread = OneThread("one")
    with pytest.raises(RuntimeError, match="of the task"):
        thread.do(fail)
    thread.close(lambda: None)


def fail() -> None:
    raise RuntimeError("of the task")
