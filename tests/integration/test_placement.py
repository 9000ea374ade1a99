"""Where Ray puts replicas on four nodes of eight GPUs: as many as fit, none across two nodes.

The GPUs are none, and the stages do no work; the flow, Ray's scheduler and its pool are real.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from jobs.cluster import plan_pool
from model.errors import UserError
from pipeline import dataflow, long_runs
from pipeline.dataflow import Tally, run_shards
from pipeline.records import Shard
from tests import fake_fleet
from tests.builders import REPOSITORY
from tests.fake_fleet import GPUS, LAST, NODES, Fleet, fleet, made, settings_for

pytestmark = pytest.mark.placement
STEADY_LOOKS = 12  # some six seconds in which nothing more is tiled


@pytest.fixture(scope="module")
def nodes() -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        patch.setattr(dataflow, "read_stage", fake_fleet.read)
        patch.setattr(dataflow, "tile_stage", fake_fleet.tile)
        patch.setattr(dataflow, "Replica", fake_fleet.FakeReplica)
        with fleet() as running:
            yield running


def run(
    folder: Path,
    tensor_parallel: int,
    replicas: tuple[int, int],
    names: Sequence[str],
    look: Callable[[Tally], None],
    **how: int,
) -> Tally:
    """Commits a shard of each name; `look` is called about twice a second."""
    shards = [Shard(str(folder), name) for name in names]
    settings = settings_for(folder, tensor_parallel, replicas, **how)
    stop = threading.Event()
    try:
        tally = run_shards(shards, settings, look, stop)
    finally:
        stop.set()  # one that is given up leaves the GPUs to the next test
    assert tally.failures == []
    assert tally.committed == tally.tiles == len(names)
    return tally


def numbered(count: int) -> list[str]:
    return [f"{number:04d}" for number in range(count)]


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_as_many_replicas_as_fit_and_none_across_nodes(
    nodes: Fleet, tmp_path: Path, tensor_parallel: int
) -> None:
    pool = plan_pool(tensor_parallel, None, "bfloat16", started_here=False)
    room = NODES * GPUS // tensor_parallel
    assert (pool.device, pool.replicas) == ("cuda", (room, room))

    def look(tally: Tally) -> None:
        if sum(map(len, made(tmp_path).values())) >= room:
            (tmp_path / "go").touch()

    run(tmp_path, tensor_parallel, pool.replicas, numbered(2 * room), look)
    found = made(tmp_path)
    assert len(found) == NODES
    for replicas in found.values():
        held = [gpu for gpus in replicas for gpu in gpus]
        assert {len(gpus) for gpus in replicas} == {tensor_parallel}
        assert sorted(held) == [str(gpu) for gpu in range(GPUS)], "each GPU once, all of them"


@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(16, None), (4, (9, 9))])
def test_what_does_not_fit_is_refused_before_anything_starts(
    nodes: Fleet, tensor_parallel: int, replicas: tuple[int, int] | None
) -> None:
    with pytest.raises(UserError):
        plan_pool(tensor_parallel, replicas, "bfloat16", started_here=False)


def test_a_node_that_is_lost_and_replaced(nodes: Fleet, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    lost: list[str] = []

    def look(tally: Tally) -> None:
        if tally.committed and len(made(tmp_path)) == NODES and not lost:
            lost.append(nodes.nodes[0].node_id)
            nodes.lose(nodes.nodes[0])
            nodes.nodes.append(nodes.add())
        if lost and nodes.nodes[-1].node_id in made(tmp_path):
            (tmp_path / "read-last").touch()

    run(tmp_path, 8, (4, 4), [*numbered(40), LAST], look)
    found = made(tmp_path)
    assert set(found) == {*lost, *(node.node_id for node in nodes.nodes)}
    assert {len(gpus) for replicas in found.values() for gpus in replicas} == {8}


def test_while_a_model_loads_no_more_is_tiled_than_the_buffer_holds(
    nodes: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    (tmp_path / "go").touch()
    num_shards, side, buffer_bytes = 60, 512, 8 << 20
    tiled: list[int] = []

    def look(tally: Tally) -> None:
        tiled.append(len(list(tmp_path.glob("tiled-*"))))
        settled = len(tiled) > STEADY_LOOKS and len(set(tiled[-STEADY_LOOKS:])) == 1 and tiled[-1]
        if settled or tiled[-1] == num_shards:
            (tmp_path / "hold").unlink(missing_ok=True)

    run(tmp_path, 8, (1, 1), numbered(num_shards), look, side=side, buffer_bytes=buffer_bytes)
    waiting = next(count for count in tiled if count and tiled.count(count) >= STEADY_LOOKS)
    assert 0 < waiting * side * side * 3 <= buffer_bytes, tiled


def test_a_pool_grows_under_load_and_shrinks_without(
    nodes: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last one: what Ray takes long to end holds GPUs that the others need."""
    sizes: list[int] = []
    drop = long_runs.DropBlockStats.on_execution_step

    def watch(self: long_runs.DropBlockStats, executor: StreamingExecutor) -> None:
        [pool] = [o for o in executor._topology if isinstance(o, ActorPoolMapOperator)]
        sizes.append(pool.get_actor_info().running)
        if sizes[-1] == 6:
            (tmp_path / "go").touch()  # all is quickly done but the last shard, which is not read
        if max(sizes) == 6 and sizes[-1] == 2:
            (tmp_path / "read-last").touch()
        drop(self, executor)

    monkeypatch.setattr(long_runs.DropBlockStats, "on_execution_step", watch)
    run(tmp_path, 4, (2, 6), [*numbered(60), LAST], lambda tally: None)
    assert max(sizes) == 6, sizes
    assert sizes.index(6) < len(sizes) - sizes[::-1].index(2), sizes
    assert sum(map(len, made(tmp_path).values())) >= 6
