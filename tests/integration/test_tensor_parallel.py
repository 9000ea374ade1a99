"""A model split over two ranks in real jobs: ranks and replicas die, and no byte changes."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from jobs.cluster import Pool
from jobs.config import ExtractConfig
from jobs.extract import describe, flow_settings
from model.checkpoint import open_checkpoint
from pipeline.commits import Commit, Computed, open_output
from pipeline.dataflow import Tally, run_shards
from pipeline.shards import list_shards
from pipeline.storage import Storage
from tests.builders import picture, run_cli, sample, write_checkpoint, write_tar
from tests.running import (
    PATIENCE_SECONDS,
    commits_below,
    comparable,
    endless_shard,
    started_cli,
    still_alive,
    strike,
    wait_until,
)

NOTHING_TO_DO = "nothing to do: all 6 shards are committed\n"
REPLICA = "ray::MapWorker(MapBatches(Replica))"

NUM_SHARDS = 6
OPTIONS = ("--tensor-parallel", "2", "--dtype", "float32", "--batch-tiles", "2")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parallel")
    for shard in range(NUM_SHARDS):
        members = []
        for index in range(12):
            members += sample(f"{index:03d}", picture(300 + 20 * index, 260, 100 * shard + index))
        write_tar(folder / "in" / f"{shard:05d}.tar", members)
    return folder / "in", write_checkpoint(folder / "model", image_size=448)


@pytest.fixture(scope="module")
def undisturbed(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
    assert done.returncode == 0, done.stderr
    return output


def test_two_ranks_embed_what_one_does(
    job: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    done = run_cli("extract", job[0], tmp_path / "out", "--model", job[1], "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    for name in ("00000", "00005"):
        tables = [
            pq.read_table(output / "embeddings" / f"{name}.parquet")
            for output in (undisturbed, tmp_path / "out")
        ]
        assert tables[0].drop(["cls"]) == tables[1].drop(["cls"])
        two, one = (t["cls"].combine_chunks().flatten().to_numpy() for t in tables)
        assert abs(two - one).max() <= 2e-3 * abs(one).max()  # float16
    (computed,) = Commit.parse((undisturbed / "commits/00000.json").read_bytes(), "").computed
    assert computed == Computed(device="cpu", tensor_parallel=2, attention="sdpa", batch_tiles=2)


def test_a_killed_rank_and_a_killed_replica_change_no_byte(
    job: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    killed: list[int] = []

    def kill_one(process: subprocess.Popen[bytes], title: str) -> bool:
        """Kills one that is at work: rank 1 is there as soon as all have loaded."""
        found = processes(process.pid, title)
        strike(found, signal.SIGKILL)
        killed.extend(victim.pid for victim in found)
        return bool(found)

    with (
        endless_shard(job[0]),
        started_cli("extract", job[0], output, "--model", job[1], *OPTIONS) as process,
    ):
        wait_until(process, lambda: commits_below(output))
        first = processes(process.pid, REPLICA)
        wait_until(process, lambda: kill_one(process, "model.ranks"))
        assert not still_alive(first)
        wait_until(process, lambda: kill_one(process, REPLICA))
        wait_until(process, lambda: len(commits_below(output)) == NUM_SHARDS)
        tree = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + signal.SIGTERM, stderr.decode()
    assert len(killed) == 2
    assert b"rank 1 ended with status -9" in stderr
    assert not still_alive(tree)
    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
    assert (done.returncode, done.stdout) == (0, NOTHING_TO_DO), done.stderr
    assert comparable(output) == comparable(undisturbed)


def test_a_stopped_rank_changes_no_byte(
    local_ray: None, job: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    """The job's own dataflow, with a shorter patience than users have."""
    config = ExtractConfig(
        input=(str(job[0]),),
        output=str(tmp_path / "out"),
        model=str(job[1]),
        dtype="float32",
        tensor_parallel=2,
        batch_tiles=2,
    )
    storage, checkpoint = Storage(), open_checkpoint(config.model)
    dataset = describe(config, checkpoint)
    open_output(config.output, dataset, storage)
    settings = flow_settings(
        config, checkpoint, dataset, Pool("cpu", (1, 1), 2, 2, 32, None), storage, "run"
    )
    settings = replace(settings, replica=replace(settings.replica, hang_seconds=15.0))
    stopped: list[psutil.Process] = []
    stop = threading.Event()

    def stop_one(tally: Tally) -> None:
        if tally.committed and not stopped:
            stopped.extend(processes(psutil.Process().pid, "model.ranks"))
            strike(stopped, signal.SIGSTOP)
        if tally.committed == NUM_SHARDS:
            stop.set()

    with endless_shard(job[0]):  # or the replica may have been given up by then
        try:
            tally = run_shards(list_shards(config.input, storage), settings, stop_one, stop)
        finally:
            stop.set()

    assert tally.failures == []
    assert tally.committed == NUM_SHARDS
    assert len(stopped) == 1
    assert not still_alive(stopped)
    storage.remove(str(tmp_path / "out" / "_runs"))
    assert comparable(tmp_path / "out") == comparable(undisturbed)


def processes(pid: int, title: str) -> list[psutil.Process]:
    """Descendants whose command line has `title` in it."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found
