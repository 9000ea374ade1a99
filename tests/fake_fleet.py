"""Four nodes of eight GPUs that are none, and stages without work: where Ray puts replicas."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.cluster_utils import Cluster

from pipeline.chunks import Chunk, TileSettings
from pipeline.dataflow import FlowSettings
from pipeline.embedding import PartSettings, embed_chunk
from pipeline.records import Head, Row, ShardEnd, rejects_table, sample_schema, tile_schema
from pipeline.replica import ReplicaSettings
from pipeline.samples import GroupRow, ReadSettings
from pipeline.stages import Attempts
from pipeline.storage import Storage
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings

NODES, GPUS = 4, 8
LAST = "~last"  # a shard of this name is read when `folder/read-last` is there
WIDTH = 4
LOOK_SECONDS = 0.05


class Fleet:
    """A head with CPUs and `NODES` workers with `GPUS` each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.nodes = [self.add() for _ in range(NODES)]

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, num_gpus=GPUS, object_store_memory=80 << 20)

    def lose(self, node: Any) -> None:
        """As a spot instance goes: at once, with all its processes."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)


@contextmanager
def fleet() -> Iterator[Fleet]:
    cluster = Cluster()
    cluster.add_node(num_cpus=4, object_store_memory=120 << 20, include_dashboard=False)
    try:
        made = Fleet(cluster)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()


def read(row: Row, settings: ReadSettings) -> Iterator[Row]:
    """One made-up sample a shard; that of `LAST` waits for a file beside it."""
    url, name = str(row["url"][0]), str(row["name"][0])
    if name == LAST:
        _wait_for(Path(url))
    sample = {"key": name, "sample_index": 0, "member": "a.png", "data": b""}
    table = pa.Table.from_pylist([sample], sample_schema(()))
    yield GroupRow(Head(name, url, 0, end=ShardEnd(1, 0, None)), table, rejects_table([])).dump()


def tile(row: Row, settings: TileSettings, attempts: Attempts) -> Iterator[Row]:
    """One tiny tile a sample."""
    group = GroupRow.load(row)
    rows = pa.Table.from_pylist(
        [
            {
                "key": group.head.shard,
                "sample_index": 0,
                "tile_index": 0,
                "tile_count": 1,
                "is_thumbnail": False,
                "tile_box": (0.0, 0.0, 2.0, 2.0),
                "width": 2,
                "height": 2,
                "image_sha256": bytes(32),
            }
        ],
        tile_schema(()),
    )
    head = Head(**{**vars(group.head), "last_chunk": True})
    yield Chunk(head, rows, group.rejects, np.zeros((1, 2, 2, 3), np.uint8)).dump()


class FakeReplica:
    """Writes down its node and its GPUs, and embeds when the file `go` is there."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        self._parts, self._folder = settings.parts, Path(settings.model)
        node = ray.get_runtime_context().get_node_id()
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        (self._folder / f"made-{node}-{os.getpid()}").write_text(gpus)

    def __call__(self, row: Row) -> Row:
        _wait_for(self._folder / "go")
        return embed_chunk(Chunk.load(row), _encode, self._parts).dump()


def _encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    return {"cls": np.ones((len(tiles), WIDTH), np.float32)}


def _wait_for(file: Path) -> None:
    never = threading.Event()
    while not file.exists():
        never.wait(LOOK_SECONDS)


def made(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Node -> the GPUs of each replica that was made there, one after the other."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for file in sorted(folder.glob("made-*")):
        _, node, _ = file.name.split("-")
        found.setdefault(node, []).append(tuple(file.read_text().split(",")))
    return found


def alive(folder: Path) -> int:
    """Replicas whose process lives."""
    return sum(psutil.pid_exists(int(file.name.split("-")[2])) for file in folder.glob("made-*"))


def settings_for(folder: Path, tensor_parallel: int, replicas: tuple[int, int]) -> FlowSettings:
    storage = Storage()
    parts = PartSettings(storage, str(folder / "out"), "run", {"cls": WIDTH}, "float16", ())
    return FlowSettings(
        read=ReadSettings(storage, ("png",)),
        tile=TileSettings(Tiling("center-crop", 2, 2), (), 60.0, 1),
        replica=ReplicaSettings(
            model=str(folder),
            revision=None,
            weights_digest="",
            device="cuda",
            dtype="bfloat16",
            attention="auto",
            layer=-1,
            batch_tiles=1,
            parts=parts,
            tensor_parallel=tensor_parallel,
        ),
        finalize=FinalizeSettings(parts, "f" * 64, 1 << 29),
        replicas=replicas,
        num_io_tasks=2,
        num_tile_tasks=2,
        max_reject_rate=1.0,
    )
