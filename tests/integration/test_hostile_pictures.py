"""On real Ray: decoders that crash, hang and run out of memory, and workers killed from outside."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import dataflow
from pipeline.commits import committed_shards
from pipeline.dataflow import Tally
from pipeline.storage import Storage
from tests.builders import Members, files_below, picture, write_checkpoint, write_tar
from tests.flows import run_flow
from tests.hostile.fragile import faulty, fragile_tile_stage

DEADLINE_SECONDS = 1.0


def run(source: Path, output: Path, checkpoint: Path) -> Tally:
    return run_flow(source, output, checkpoint, chunk_tiles=8, deadline_seconds=DEADLINE_SECONDS)


def pictures(count: int, **faults: str) -> Members:
    """`count` pictures; `p03="load-segv"` gives the fourth that fault."""
    return [
        (
            f"{index:02}.jpg",
            faulty(image, faults[name]) if (name := f"p{index:02}") in faults else image,
        )
        for index in range(count)
        for image in [picture(60 + index, 60, seed=index)]
    ]


def rejects_of(output: Path, shard: str) -> list[tuple[str, str]]:
    rows = pq.read_table(output / f"rejects/{shard}.parquet").to_pylist()
    return [(row["key"], f"{row['stage']}/{row['error']}") for row in rows]


def test_pictures_that_end_their_worker_become_rejects(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dataflow, "tile_stage", fragile_tile_stage)
    source, output = tmp_path / "in", tmp_path / "out"
    write_tar(source / "crash.tar", pictures(30, p00="open-segv", p21="load-segv"))
    write_tar(source / "hang.tar", pictures(20, p13="load-hang"))
    write_tar(source / "memory.tar", pictures(20, p19="load-memory"))
    write_tar(source / "sound.tar", pictures(20))

    tally = run(source, output, write_checkpoint(tmp_path / "model"))

    assert tally.failures == []
    assert committed_shards(str(output), Storage()) == {"crash", "hang", "memory", "sound"}
    assert rejects_of(output, "crash") == [("00", "decode/crashed"), ("21", "decode/crashed")]
    assert rejects_of(output, "hang") == [("13", "decode/deadline")]
    assert rejects_of(output, "memory") == [("19", "decode/memory")]
    for shard, count in {"crash": 28, "hang": 19, "memory": 19, "sound": 20}.items():
        assert pq.read_table(output / f"embeddings/{shard}.parquet").num_rows == count


def test_a_worker_killed_from_outside_leaves_no_trace(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the start of its group, and when some of its chunks are already on their way."""
    monkeypatch.setattr(dataflow, "tile_stage", fragile_tile_stage)
    checkpoint = write_checkpoint(tmp_path / "model")
    flags = [tmp_path / "flag-0", tmp_path / "flag-1"]
    write_tar(tmp_path / "in/first.tar", pictures(20, p02=f"open-kill-once:{flags[0]}"))
    write_tar(tmp_path / "in/late.tar", pictures(30, p27=f"load-kill-once:{flags[1]}"))

    run(tmp_path / "in", tmp_path / "killed", checkpoint)
    assert all(flag.exists() for flag in flags)
    run(tmp_path / "in", tmp_path / "undisturbed", checkpoint)

    killed, undisturbed = (
        {
            name: data
            for name, data in files_below(tmp_path / output).items()
            if name.startswith(("embeddings/", "rejects/"))
        }
        for output in ("killed", "undisturbed")
    )
    assert sorted(killed) == ["embeddings/first.parquet", "embeddings/late.parquet"]
    assert killed == undisturbed
