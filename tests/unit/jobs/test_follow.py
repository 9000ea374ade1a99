"""A followed log comes whole, once and in order, wherever its connections break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import follow as follow_module
from jobs.follow import AWAY_SECONDS, Shown, follow
from jobs.ray_jobs import Cluster, Job, UnknownJobError
from jobs.terminal import BrokenRunError

LOG = "".join(f"line {number}\n" for number in range(7)) + "no end"


def job(status: str, exit_code: int | None = None) -> Job:
    return Job("j", status, "", "command", {}, 1.0, None, exit_code)


@dataclass
class Broken(Cluster):
    """A cluster whose connections each bring the log up to some character, and then fail."""

    reaches: Sequence[int]
    failure: Exception | None = None
    log_failure: Exception | None = None
    asked: int = 0
    connections: int = 0
    client: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        self.client = SimpleNamespace(tail_job_logs=self.tail)

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        reach = self.reaches[self.connections]
        self.connections += 1
        for start in range(0, reach, 5):
            yield LOG[start : min(start + 5, reach)]
        if self.failure is not None:
            raise self.failure

    def job(self, job_id: str) -> Job:
        self.asked += 1
        return job("RUNNING" if self.connections < len(self.reaches) else "SUCCEEDED", 0)

    def log(self, job_id: str) -> str:
        if self.log_failure is not None:
            raise self.log_failure
        return LOG


def followed(
    cluster: Cluster,
    clock: Callable[[], float] = lambda: 0.0,
    pause: Callable[[float], object] = lambda seconds: None,
) -> tuple[str, Job]:
    written: list[str] = []
    ended = follow(cluster, "j", written.append, pause, clock)
    return "".join(written), ended


@pytest.mark.parametrize(
    "failure", [None, RuntimeError("closed"), aiohttp.ClientError("reset"), TimeoutError()]
)
@pytest.mark.parametrize(
    "reaches", [(0,), (len(LOG),), (3, 3, 20), (20, 11, 0, 30), (30, 30), (60, 1)]
)
def test_each_character_once_and_in_order(
    reaches: tuple[int, ...], failure: Exception | None
) -> None:
    text, ended = followed(Broken(reaches, failure))
    assert text == LOG
    assert ended.exit_status == 0


def test_a_connection_that_closes_early_is_not_made_again_at_once() -> None:
    pauses: list[float] = []
    followed(Broken((5, 5, 5)), pause=pauses.append)
    assert pauses == [1.0, 1.0]


def test_a_cluster_is_asked_less_and_less_often() -> None:
    pauses: list[float] = []

    class Away(Broken):
        def job(self, job_id: str) -> Job:
            if len(pauses) < 6:
                raise ConnectionError("refused")
            return super().job(job_id)

    text, _ = followed(Away((30,)), pause=pauses.append)
    assert text == LOG
    assert pauses == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


@given(st.text(max_size=60), st.lists(st.lists(st.integers(1, 9), max_size=9), max_size=5))
def test_pieces_of_any_size_make_the_same_text(text: str, connections: list[list[int]]) -> None:
    text = "".join(c if c.isprintable() else "\n" for c in text)
    written: list[str] = []
    shown = Shown(written.append)
    for sizes in [*connections, [1] * len(text)]:
        shown.begin()
        start = 0
        for size in sizes:
            shown.feed(text[start : start + size])
            start += size
    assert "".join(written) == text


def test_a_connection_that_goes_silent_is_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow_module, "SILENCE_SECONDS", 0.01)

    class Silent(Broken):
        async def tail(self, job_id: str) -> AsyncIterator[str]:
            self.connections += 1
            yield LOG[:9]
            await asyncio.Event().wait()

    cluster = Silent((9, 9))
    text, _ = followed(cluster)
    assert (text, cluster.connections) == (LOG, 2)
    assert capsys.readouterr().err == "", "a job may have nothing to say"


def test_what_the_log_says_cannot_command_the_terminal() -> None:
    written: list[str] = []
    Shown(written.append).feed("a\x1b[2Jb\nc")
    assert written == ["a\\x1b[2Jb\nc"]


def test_a_cluster_that_stays_away_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    class Away(Broken):
        def job(self, job_id: str) -> Job:
            raise ConnectionError("refused")

    moments = iter([0.0, 0.0, 1.0, AWAY_SECONDS + 1])
    with pytest.raises(BrokenRunError, match="tessera submit --follow j"):
        followed(Away(()), lambda: next(moments))
    assert capsys.readouterr().err.count("connection is lost") == 1, "said once"


def test_a_job_nobody_knows_ends_at_once() -> None:
    class Empty(Broken):
        def job(self, job_id: str) -> Job:
            raise UnknownJobError("job j: unknown")

    with pytest.raises(UnknownJobError):
        followed(Empty(()))


def test_the_end_of_a_log_is_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Broken):
        asked_for_log = 0

        def log(self, job_id: str) -> str:
            self.asked_for_log += 1
            if self.asked_for_log < 3:
                raise BrokenRunError("500")
            return LOG

    pauses: list[float] = []
    text, _ = followed(Slow((10,)), pause=pauses.append)
    assert text == LOG
    assert capsys.readouterr().err == ""
    assert pauses == [1.0, 1.0]


def test_a_log_that_is_gone_does_not_hide_how_the_job_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, ended = followed(Broken((10,), log_failure=BrokenRunError("its node is gone")))
    assert text == LOG[:10]
    assert ended.status == "SUCCEEDED"
    assert "its node is gone" in capsys.readouterr().err
