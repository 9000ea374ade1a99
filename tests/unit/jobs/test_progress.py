"""The record of a run stays small, and a run goes on where it cannot be written."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from jobs.progress import RECORDED_FAILURES, Reporter
from pipeline.commits import Failure, Progress
from pipeline.dataflow import Tally
from pipeline.storage import Storage


def test_only_the_first_failures_are_named(tmp_path: Path) -> None:
    tally = Tally(shards=5000, committed=7)
    tally.failures = [Failure(shard=f"{n:05d}", reason="gone") for n in range(3000)]
    Reporter(str(tmp_path), "r", Storage()).record(tally, ended=True)
    (file,) = tmp_path.glob("_runs/r/progress.json")
    progress = Progress.parse(file.read_bytes(), str(file))
    assert progress.failures == tuple(tally.failures[:RECORDED_FAILURES])
    assert len(progress.failures) + progress.more_failures == 3000


def test_a_record_of_few_failures_names_them_all(tmp_path: Path) -> None:
    tally = Tally(shards=2, failures=[Failure(shard="a", reason="gone")])
    Reporter(str(tmp_path), "r", Storage()).record(tally, ended=False)
    progress = Progress.parse((tmp_path / "_runs/r/progress.json").read_bytes(), "p")
    assert progress.failures == (Failure(shard="a", reason="gone"),)
    assert progress.more_failures == 0


class FullStorage(Storage):
    def publish_bytes(self, url: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, f"cannot write {url}: No space left on device")


def test_a_full_disk_is_told_and_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Reporter("/out", "run", FullStorage()) as reporter:
        reporter.tick(Tally(3))
        reporter.record(Tally(3), ended=True)
    assert [record.message for record in caplog.records] == [
        "[Errno 28] cannot write /out/_runs/run/progress.json: No space left on device; "
        "`tessera status` will not know how far this run is"
    ] * 2
