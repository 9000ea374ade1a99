"""The record of a run stays small, whatever goes wrong in it."""

from __future__ import annotations

from pathlib import Path

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
