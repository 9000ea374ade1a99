"""Which segments a cluster is asked to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import UserError
from pipeline import index_flow
from pipeline.index_flow import build_side_by_side
from pipeline.index_kinds import task_bytes
from pipeline.index_record import Flat, IndexFile, Model
from pipeline.index_sample import PlannedShard, VectorSource
from pipeline.index_segments import SegmentRequest
from pipeline.read import open_output
from tests.stages import STORAGE
from tests.vector_outputs import put_shard, vector_dataset


def node(memory: int, cpus: int = 2, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"memory": float(memory), "CPU": float(cpus)}}


def test_a_segment_that_no_node_can_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, dataset = str(tmp_path / "out"), vector_dataset({"cls": 1024})
    put_shard(output, dataset, "a", {"cls": np.ones((1, 1024))}, STORAGE)
    source = VectorSource(open_output(output, STORAGE), "cls", "first")
    queries = IndexFile(path="q", bytes=1, sha256="0")
    model = Model(name="m", trained=None, queries=queries)
    requests = [
        SegmentRequest("i", source, None, Flat(), model, (PlannedShard("a", pictures, "c"),))
        for pictures in (10, 500_000, 20)
    ]
    needed = task_bytes(Flat(), 1024, 500_000)
    nodes = [node(needed - 1), node(2 * needed, cpus=0), node(2 * needed, alive=False)]
    monkeypatch.setattr(index_flow.ray, "nodes", lambda: nodes)
    said = (
        rf"a segment of 500,000 vectors takes {needed >> 20:,} MiB of memory to build, "
        rf"and the largest node of the cluster has {(needed - 1) >> 20:,} MiB; use a larger one"
    )
    with pytest.raises(UserError, match=said):
        next(build_side_by_side(requests, 2, STORAGE))
