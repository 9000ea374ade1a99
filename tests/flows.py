"""The dataflow on real Ray, driven in the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.cluster import CPU_CHUNK_TILES, Pool
from jobs.config import ExtractConfig
from jobs.extract import describe, flow_settings
from model.checkpoint import open_checkpoint
from pipeline.commits import committed_shards, open_output
from pipeline.dataflow import Tally, run_shards
from pipeline.shards import list_shards
from pipeline.storage import Storage


def run_flow(
    source: Path,
    output: Path | str,
    checkpoint: Path,
    tick: Callable[[Tally], None] = lambda tally: None,
    *,
    chunk_tiles: int = CPU_CHUNK_TILES,
    deadline_seconds: float | None = None,
    **options: Any,
) -> Tally:
    """Commits what is not committed, on the cluster that is connected; all may be rejects."""
    config = ExtractConfig(
        **{"dtype": "float32", "max_reject_rate": 1.0, **options},
        input=(str(source),),
        output=str(output),
        model=str(checkpoint),
    )
    storage = Storage(config.storage_options)
    opened = open_checkpoint(config.model)
    dataset = describe(config, opened)
    open_output(config.output, dataset, storage)
    pool = Pool("cpu", (1, 1), 2, 2, chunk_tiles, None)
    settings = flow_settings(config, opened, dataset, pool, storage, "run")
    if deadline_seconds is not None:
        tile = replace(settings.tile, deadline_seconds=deadline_seconds)
        settings = replace(settings, tile=tile)
    committed = committed_shards(config.output, storage)
    pending = [s for s in list_shards(config.input, storage) if s.name not in committed]
    stop = threading.Event()
    try:
        return run_shards(pending, settings, tick, stop)
    except BaseException:
        stop.set()  # a test that is given up leaves no dataset to the next one
        raise
