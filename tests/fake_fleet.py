"""Four nodes of eight GPUs that are none, and stages without work: what Ray does with replicas.

Files in one folder, the model's, steer it: replicas load while `hold` is there and embed once `go`
is; shard `LAST` is read when `read-last` is there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.cluster_utils import Cluster

from benchmarks.bookkeeping_flow import WIDTH, flow_settings_of_stubs
from pipeline.chunks import Chunk, TileSettings
from pipeline.dataflow import FlowSettings
from pipeline.embedding import embed_chunk
from pipeline.records import Head, Row, ShardEnd, rejects_table, sample_schema, tile_schema
from pipeline.replica import ReplicaSettings
from pipeline.samples import GroupRow, ReadSettings
from pipeline.stages import Attempts
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings

NODES, GPUS = 4, 8
LAST = "~last"
LOOK_SECONDS = 0.05


class Fleet:
    """A head that has all the CPUs, and `NODES` workers with `GPUS` each.

    Ray ends idle processes beyond a node's CPUs, to start them again: seconds of two real cores.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.nodes = [self.add() for _ in range(NODES)]

    def add(self) -> Any:
        """Ray finds it when it is there: nobody waits here."""
        return self._cluster.add_node(
            wait=False, num_cpus=0, num_gpus=GPUS, object_store_memory=80 << 20
        )

    def lose(self, node: Any) -> None:
        """As a spot instance goes: at once, with all its processes."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)


@contextmanager
def fleet() -> Iterator[Fleet]:
    cluster = Cluster()
    cluster.add_node(num_cpus=8, object_store_memory=120 << 20, include_dashboard=False)
    try:
        made = Fleet(cluster)
        cluster.wait_for_nodes(timeout=240)
        ray.init(address=cluster.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()


def read(row: Row, settings: ReadSettings, output: FinalizeSettings) -> Iterator[Row]:
    """One made-up sample a shard; its URL is the folder."""
    url, name = str(row["url"][0]), str(row["name"][0])
    if name == LAST:
        _wait_until((Path(url) / "read-last").exists)
    sample = {"key": name, "sample_index": 0, "member": "a.png", "data": b""}
    table = pa.Table.from_pylist([sample], sample_schema(()))
    yield GroupRow(Head(name, url, 0, end=ShardEnd(1, 0, None)), table, rejects_table([])).dump()


def tile(row: Row, settings: TileSettings, attempts: Attempts) -> Iterator[Row]:
    """One tile a sample."""
    group = GroupRow.load(row)
    side = settings.tiling.tile_size
    (Path(group.head.url) / f"tiled-{group.head.shard}").touch()
    rows = pa.Table.from_pylist(
        [
            {
                "key": group.head.shard,
                "sample_index": 0,
                "tile_index": 0,
                "tile_count": 1,
                "is_thumbnail": False,
                "tile_box": (0.0, 0.0, 1.0, 1.0),
                "width": side,
                "height": side,
                "image_sha256": bytes(32),
            }
        ],
        tile_schema(()),
    )
    head = Head(**{**vars(group.head), "last_chunk": True})
    yield Chunk(head, rows, group.rejects, np.zeros((1, side, side, 3), np.uint8)).dump()


class FakeReplica:
    """Writes down its node and its GPUs, and embeds when the file `go` is there."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        self._parts, self._folder = settings.parts, Path(settings.model)
        node = ray.get_runtime_context().get_node_id()
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        (self._folder / f"made-{node}-{os.getpid()}").write_text(gpus)
        _wait_until(lambda: not (self._folder / "hold").exists())

    def __call__(self, row: Row) -> Row:
        _wait_until((self._folder / "go").exists)
        return embed_chunk(Chunk.load(row), _encode, self._parts).dump()


def _encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    return {"cls": np.ones((len(tiles), WIDTH), np.float32)}


def _wait_until(there: Callable[[], bool]) -> None:
    never = threading.Event()
    while not there():
        never.wait(LOOK_SECONDS)


def made(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Node -> the GPUs of each replica that was made there, one after the other."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for file in sorted(folder.glob("made-*")):
        _, node, _ = file.name.split("-")
        found.setdefault(node, []).append(tuple(file.read_text().split(",")))
    return found


def settings_for(
    folder: Path,
    tensor_parallel: int,
    replicas: tuple[int, int],
    *,
    side: int = 2,
    buffer_bytes: int | None = None,
) -> FlowSettings:
    """Fakes all through; tiles are `side` pixels wide and high."""
    settings = flow_settings_of_stubs(folder, folder)
    return replace(
        settings,
        tile=TileSettings(Tiling("center-crop", side, side), (), 60.0, 1),
        replica=replace(
            settings.replica, device="cuda", dtype="bfloat16", tensor_parallel=tensor_parallel
        ),
        replicas=replicas,
        buffer_bytes=buffer_bytes,
    )
