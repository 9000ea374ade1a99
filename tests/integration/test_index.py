"""An index whose segments are built side by side by Ray, and a driver that is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import index as index_job
from jobs.index import build_index
from pipeline import index_kinds
from pipeline.index_record import RECORD
from pipeline.index_segments import build_segment
from pipeline.vector_index import VectorIndex
from tests.builders import cli_env, files_below
from tests.running import PATIENCE_SECONDS, wait_until
from tests.stages import STORAGE
from tests.vector_outputs import clustered, put_shard, vector_dataset

WIDTH, PICTURES, SHARDS = 48, 400, 6
DATASET = vector_dataset({"cls": WIDTH})
# Segments as small as a shard, so that there are several.
SEGMENT_BYTES = 400 * 100
DRIVER = f"""
import sys
from pipeline import index_kinds
index_kinds.SEGMENT_BYTES = {SEGMENT_BYTES}
from jobs.index import build_index
build_index(sys.argv[1], sys.argv[2], kind="hnsw")
"""
# Two at once, and none after the second that is done: three are begun, and it waits for ever.
STARTED = 3
STOPPING = """
import threading
from pipeline import cpus, index_flow
cpus.usable_cpus = lambda: 2
build = index_flow.build_side_by_side
def stopping(*given):
    for number, built in enumerate(build(*given), 1):
        yield built
        if number == 2:
            threading.Event().wait()
index_flow.build_side_by_side = stopping
"""


def driver(output: Path, index: Path, before: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", before + DRIVER, str(output), str(index)],
        env=cli_env({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def whole_segments(index: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (index / "segments").glob("*.json")}


def without_time(index: Path) -> dict[str, bytes]:
    files = files_below(index)
    record = json.loads(files[RECORD])
    del record["made_at"]
    return {**files, RECORD: json.dumps(record).encode()}


def test_a_killed_driver_and_the_run_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, index = tmp_path / "out", tmp_path / "index"
    for seed in range(SHARDS):
        values = {"cls": clustered(PICTURES, WIDTH, seed)}
        put_shard(str(output), DATASET, f"s{seed}", values, STORAGE, group_rows=100)
    killed = driver(output, index, STOPPING)
    try:
        wait_until(killed, lambda: len(whole_segments(index)) == STARTED)
        assert killed.poll() is None
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        killed.kill()
        killed.communicate()
    made = whole_segments(index)
    assert len(made) == STARTED
    assert not (index / RECORD).exists()
    again = driver(output, index)
    try:
        told = again.communicate(timeout=PATIENCE_SECONDS)[1].decode()
    finally:
        again.kill()
    assert again.returncode == 0, told
    assert f"segment {SHARDS} of {SHARDS}: {PICTURES} vectors" in told
    assert {path: whole_segments(index)[path] for path in made} == made
    # The same as one process makes, one segment after the other.
    monkeypatch.setattr(index_kinds, "SEGMENT_BYTES", SEGMENT_BYTES)
    monkeypatch.setattr(
        index_job,
        "build_on_ray",
        lambda requests, storage: [build_segment(request, storage) for request in requests],
    )
    build_index(str(output), str(tmp_path / "serial"), kind="hnsw")
    assert without_time(index) == without_time(tmp_path / "serial")
    record = VectorIndex.open(str(index), STORAGE).record
    assert (len(record.segments), record.live_vectors) == (SHARDS, SHARDS * PICTURES)
