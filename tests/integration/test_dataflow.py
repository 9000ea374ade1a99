"""The dataflow on real Ray in this process: replicas really killed, objects that cannot be put."""

from __future__ import annotations

import atexit
import io
import os
import secrets
import signal
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.actor import ActorHandle
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline import dataflow, long_runs
from pipeline.commits import Commit, committed_shards
from pipeline.dataflow import Tally
from pipeline.ledger import CompleteShard
from pipeline.records import Row
from pipeline.replica import Replica, ReplicaSettings, living_replicas, replica_name
from pipeline.stages import finalize_stage
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings
from tests.book import Book
from tests.builders import picture, sample, samples, write_checkpoint, write_tar
from tests.flows import run_flow
from tests.running import still_alive

POISON = 255
LOOKS = 3000  # ten a second


class FragileReplica(Replica):
    """Dies by SIGKILL when a tile is all white, as a driver fault on one input would do."""

    def __call__(self, row: Row) -> Row:
        encode = self._encoder.encode

        def fragile(tiles: np.ndarray) -> dict[str, np.ndarray]:
            if (tiles == POISON).all(axis=(1, 2, 3)).any():
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(tiles)

        self._encoder.encode = fragile  # type: ignore[method-assign]
        return super().__call__(row)


class WrittenDownReplica(Replica):
    """Leaves a file beside the model each time that one is loaded, which takes, but not for ever,
    until a file `held-back` lies there."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        folder = Path(settings.model).parent
        (folder / f"loaded-{secrets.token_hex(4)}").touch(exist_ok=False)
        wait_for(folder / "held-back")
        super().__init__(settings, deaths)


class HeldReplica(Replica):
    """Leaves a file `held` beside the model, and embeds when a file `go` lies there, or at last
    without it."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        self._folder = Path(settings.model).parent
        super().__init__(settings, deaths)

    def __call__(self, row: Row) -> Row:
        (self._folder / "held").touch()
        wait_for(self._folder / "go")
        return super().__call__(row)


class LingeringReplica(Replica):
    """Does not end by itself: what was to be called first at its end is called last, and waits."""

    exit_seconds = 1

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        atexit.register(threading.Event().wait)
        super().__init__(settings, deaths)
        (Path(settings.model).parent / f"pid-{os.getpid()}").touch()


def wait_for(file: Path) -> None:
    never = threading.Event()
    for _ in range(LOOKS):
        if file.exists():
            break
        never.wait(0.1)


def held_finalize(shard: CompleteShard, settings: FinalizeSettings, replaced: str) -> bytes:
    """Waits, not for ever, until a file `go` lies beside OUTPUT."""
    go, never = Path(settings.parts.output).parent / "go", threading.Event()
    for _ in range(LOOKS):
        if go.exists():
            return finalize_stage(shard, settings, replaced)
        never.wait(0.1)
    raise OSError("nobody looked")


def folders(folder: Path) -> tuple[Path, Path]:
    return folder / "in", folder / "out"


def white(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(sink, "PNG")
    return sink.getvalue()


def test_a_chunk_that_kills_three_replicas_becomes_rejects(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    book = Book()
    monkeypatch.setattr(dataflow, "Replica", FragileReplica)
    monkeypatch.setattr(dataflow, "RaySink", lambda run: book)
    write_tar(tmp_path / "in" / "good.tar", samples(6))
    poisoned = [
        *sample("a", picture(60, 60)),
        ("b.png", white(60, 60)),
        *sample("c", picture(50, 70)),
    ]
    write_tar(tmp_path / "in" / "poisoned.tar", poisoned)

    tally = run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"))

    assert tally.failures == []
    assert tally.rejects == {"embed/replica-died": 3}
    assert committed_shards(str(tmp_path / "out"), Storage()) == {"good", "poisoned"}
    rejects = pq.read_table(tmp_path / "out/rejects/poisoned.parquet").to_pylist()
    assert [(r["key"], r["stage"], r["error"]) for r in rejects] == [
        (key, "embed", "replica-died") for key in "abc"
    ]
    assert rejects[0]["message"] == "3 replicas died while they computed this chunk"
    assert pq.read_table(tmp_path / "out/embeddings/good.parquet").num_rows == 6
    told = {name: book.counters[name] for name in book.counters if "seconds" not in name}
    assert told["deaths embed"] == 3
    assert told["rejects embed replica-died"] == 3
    assert (told["tiles"], told["pictures"], told["shards committed"]) == (6, 6, 2)
    assert "deaths tile" not in told


def test_a_replica_that_started_again_is_another_one(local_ray: None) -> None:
    @ray.remote(num_cpus=0, max_restarts=1, max_task_retries=-1)
    class Named:
        def name(self) -> str:
            return replica_name(ray.get_runtime_context().get_actor_id(), os.getpid())

    actor = Named.remote()
    before = ray.get(actor.name.remote())
    assert before in living_replicas()
    ray.kill(actor, no_restart=False)
    after = before
    while after == before:  # the order to die takes another way than the question
        after = ray.get(actor.name.remote())
    assert before.split("-")[0] == after.split("-")[0]
    assert living_replicas() & {before, after} == {after}


def test_the_memory_of_deaths_may_die_itself(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dataflow, "Replica", HeldReplica)
    write_tar(tmp_path / "in" / "a.tar", samples(200))
    killed: list[int] = []
    alive: set[str] = set()

    def kill_once(tally: Tally) -> None:
        if (tmp_path / "held").exists() and not killed:
            alive.update(living_replicas())
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "".join(child.cmdline()).startswith("ray::Deaths"):
                        child.kill()
                        killed.append(child.pid)
            (tmp_path / "go").touch()

    tally = run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"), kill_once)

    assert killed
    assert alive
    assert (tally.committed, tally.failures) == (1, [])
    commit = Commit.parse((tmp_path / "out/commits/a.json").read_bytes(), "a")
    assert {embedder.replica for embedder in commit.replicas} <= alive
    assert pq.read_table(tmp_path / "out/embeddings/a.parquet").num_rows == 200


def test_a_replica_that_does_not_end_is_ended(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would keep its GPU from the next run."""
    monkeypatch.setattr(dataflow, "Replica", LingeringReplica)
    write_tar(tmp_path / "in" / "a.tar", samples(4))

    tally = run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"))

    assert (tally.committed, tally.failures) == (1, [])
    (pid,) = [int(file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    with suppress(psutil.NoSuchProcess):
        assert not still_alive([psutil.Process(pid)], seconds=60)


def test_an_output_that_cannot_be_written_fails_its_shard_alone(
    local_ray: None, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "in" / f"{name}.tar", samples(4, prefix=name))
    checkpoint = write_checkpoint(tmp_path / "model")
    blocked = tmp_path / "out" / "embeddings" / "b.parquet"
    blocked.mkdir(parents=True)  # a folder where the object should be

    tally = run_flow(*folders(tmp_path), checkpoint)

    assert committed_shards(str(tmp_path / "out"), Storage()) == {"a", "c"}
    assert [failure.shard for failure in tally.failures] == ["b"]
    assert "b.parquet" in tally.failures[0].reason
    blocked.rmdir()
    assert run_flow(*folders(tmp_path), checkpoint).failures == []
    assert committed_shards(str(tmp_path / "out"), Storage()) == {"a", "b", "c"}


def test_a_run_is_looked_after_while_as_many_are_finalized_as_may_be(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Publishing a shard takes minutes where its parts are large."""
    monkeypatch.setattr(dataflow, "finalize_stage", held_finalize)
    names = {"a", "b", "c", "d"}
    for name in names:
        write_tar(tmp_path / "in" / f"{name}.tar", samples(2, prefix=name))
    full: list[int] = []  # two are being finalized, a third is complete, and the fourth not booked

    def look(tally: Tally) -> None:
        if tally.tiles == 6:
            full.append(tally.committed)
        if len(full) == 5:
            (tmp_path / "go").touch()

    tally = run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"), look)

    assert full[:5] == [0] * 5
    assert tally.failures == []
    assert committed_shards(str(tmp_path / "out"), Storage()) == names


def test_an_error_of_the_driver_ends_the_flow_too(local_ray: None, tmp_path: Path) -> None:
    """Ray Data's threads would call Ray after its shutdown, and start a second cluster."""
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "in" / f"{name}.tar", samples(40, prefix=name))

    def fail(tally: Tally) -> None:
        if tally.tiles:
            raise OSError("no space for progress.json")

    with pytest.raises(OSError, match="no space"):
        run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"), fail)
    left = [
        t for t in threading.enumerate() if t.name.startswith(("ray-data", "StreamingExecutor"))
    ]
    for thread in left:
        thread.join(60)  # Ray Data itself waits two to five seconds for them
    assert not [thread.name for thread in left if thread.is_alive()]


def test_one_replica_serves_a_run_of_many_input_blocks(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model is loaded once, stages are held back, and nothing is kept of a block.

    Not asserted: how many blocks wait. While nothing at all runs, as where a model is loaded, Ray
    starts a task whatever its policies say.
    """
    monkeypatch.setattr(dataflow, "Replica", WrittenDownReplica)
    monkeypatch.setattr(dataflow, "FEED_SHARDS", 3)
    monkeypatch.setattr(long_runs, "WAITING_SHARDS", 1)
    monkeypatch.setattr(long_runs, "WAITING_CHUNKS", 2)
    kept: list[list[int]] = []
    held_back: set[str] = set()
    drop = long_runs.DropBlockStats.on_execution_step

    def watch(self: long_runs.DropBlockStats, executor: StreamingExecutor) -> None:
        stages = [(o, s) for o, s in executor._topology.items() if isinstance(o, MapOperator)]
        assert len(stages) == 5
        kept.append([len(operator._output_blocks_stats) for operator, _ in stages])
        drop(self, executor)
        assert not any(operator._output_blocks_stats for operator, _ in stages)

    can_add = long_runs.QueueLimit.can_add_input

    def watch_limit(self: long_runs.QueueLimit, op: PhysicalOperator) -> bool:
        allowed = can_add(self, op)
        if not allowed:
            held_back.add(op.name)
            if op.name == "MapBatches(tile_stage)":
                (tmp_path / "held-back").touch()
        return allowed

    monkeypatch.setattr(long_runs.DropBlockStats, "on_execution_step", watch)
    monkeypatch.setattr(long_runs.QueueLimit, "can_add_input", watch_limit)
    names = {f"{number:02d}" for number in range(13)}
    for name in names:
        write_tar(tmp_path / "in" / f"{name}.tar", samples(2, prefix=name))

    tally = run_flow(*folders(tmp_path), write_checkpoint(tmp_path / "model"))

    assert tally.failures == []
    assert committed_shards(str(tmp_path / "out"), Storage()) == names
    assert len(list(tmp_path.glob("loaded-*"))) == 1
    assert max(map(max, kept)) > 0, "Ray Data keeps statistics elsewhere"
    assert {"MapBatches(feed_stage)", "MapBatches(tile_stage)"} <= held_back
