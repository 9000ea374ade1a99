"""What a replica refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from model.checkpoint import open_checkpoint, weights_digest
from model.errors import CheckpointError
from pipeline.replica import Replica, ReplicaSettings
from tests.builders import write_checkpoint
from tests.stages import part_settings


def test_other_weights_than_the_drivers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node's copy of the checkpoint is an older one."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    model = write_checkpoint(tmp_path / "model")
    found = weights_digest(open_checkpoint(str(model)))
    settings = ReplicaSettings(
        str(model), None, "f" * 64, "cpu", "float32", "sdpa", 1, 2, part_settings(tmp_path)
    )
    with pytest.raises(
        CheckpointError, match=rf"10\.0\.0\.7 differ from the driver's \({found[:12]}, f{{12}}\)"
    ):
        Replica(settings, None)
