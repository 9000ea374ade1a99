"""A run goes on where its progress cannot be recorded."""

from __future__ import annotations

import errno
import logging

import pytest

from jobs.progress import Reporter
from pipeline.dataflow import Tally
from pipeline.storage import Storage


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
