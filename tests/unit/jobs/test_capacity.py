"""Arithmetic of a plan: rates, memory, bytes, requests."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient

from jobs import trial as trial_module
from jobs.capacity import (
    CHUNK_SECONDS,
    PLANNED_BATCH,
    SHARD_SECONDS,
    Work,
    driver_seconds,
    fits,
    object_store_bytes,
    output_bytes,
    output_objects,
    replica_rate,
    request_price,
    requests,
)
from jobs.device_tables import load_devices, load_prices
from jobs.trial import try_out
from model.errors import UserError
from model.work import V1_5, rank_flop, sums_seconds
from pipeline.chunks import TileSettings
from pipeline.commits import Format
from pipeline.embedding import PartSettings
from pipeline.layout import Layout
from pipeline.lease import mark_url
from pipeline.records import Shard
from pipeline.samples import ReadSettings
from pipeline.storage import Storage
from pipeline.tiling import Tiling
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import picture, samples, tar_bytes
from tests.outputs import extract_plainly
from tests.planning import COSTS, WORK
from tests.s3 import S3Server
from tests.stages import TILING, compute_shard, encode

TABLE = load_devices(None)
H100, L4, A100 = TABLE.find("H100"), TABLE.find("L4"), TABLE.find("A100")


def test_an_h100_at_its_peak_embeds_83_tiles_of_the_6b() -> None:
    assert replica_rate(V1_5, 45, H100, 1, "bfloat16", 1.0) == pytest.approx(989 / 11.94, rel=0.002)
    assert replica_rate(V1_5, 45, H100, 1, "bfloat16", 0.6) == pytest.approx(49.7, rel=0.002)


def test_a_split_model_gives_fewer_tiles_for_each_device() -> None:
    rates = [replica_rate(V1_5, 45, H100, n, "bfloat16", 0.6) / n for n in (1, 2, 4, 8)]
    assert rates == sorted(rates, reverse=True)
    slower = [replica_rate(V1_5, 45, L4, n, "bfloat16", 0.6) / n for n in (1, 4)]
    assert slower[1] / slower[0] < 0.8  # over PCIe
    with pytest.raises(UserError, match="tensor_parallel: 26"):
        replica_rate(V1_5, 45, H100, 26, "bfloat16", 0.6)


def test_the_busiest_rank_and_the_sums_make_a_tile() -> None:
    computing = rank_flop(V1_5, 2) / (989e12 * 0.6)
    summing = sums_seconds(V1_5, 2, 45, 360e9, 3.4e-6, PLANNED_BATCH)
    found = replica_rate(V1_5, 45, H100, 2, "bfloat16", 0.6)
    assert found == pytest.approx(1 / (computing + summing))


def test_float8_is_faster_where_a_device_has_it() -> None:
    quick = replica_rate(V1_5, 45, H100, 1, "fp8", 0.6)
    plain = replica_rate(V1_5, 45, H100, 1, "bfloat16", 0.6)
    assert 1.8 < quick / plain < 2.0  # attention stays in bfloat16
    with pytest.raises(UserError, match="A100 has no float8"):
        replica_rate(V1_5, 45, A100, 1, "fp8", 0.6)


def test_what_fits_into_a_device() -> None:
    assert fits(V1_5, L4, 1, "bfloat16")
    small = L4.model_copy(update={"memory_gb": 12})
    assert not fits(V1_5, small, 1, "bfloat16")
    assert fits(V1_5, small, 2, "bfloat16")
    assert fits(V1_5, small, 1, "fp8")


def test_the_driver_pays_for_shards_and_chunks() -> None:
    assert driver_seconds(WORK) == pytest.approx(100 * SHARD_SECONDS + 69_900 * CHUNK_SECONDS)
    assert driver_seconds(replace(WORK, chunks=0)) == 100 * SHARD_SECONDS


def test_output_is_cut_into_objects() -> None:
    # 80 000 rows of 6 500 bytes are 520 MB a shard: one object of up to 536.9 MB
    assert output_bytes(WORK, COSTS) == 8e6 * 6500 + 100 * 700
    assert output_objects(WORK, COSTS, 512 << 20) == 100
    assert output_objects(WORK, COSTS, 260_000_000) == 200


def test_requests_by_kind() -> None:
    # a shard: 10^9 bytes are 120 blocks; 520 MB are 16 parts of 32 MiB and two requests about them
    counts = requests(WORK, COSTS, 3600.0, 512 << 20)
    assert counts["get"] == 100 * 120 + 70_000 + 2 * 720
    assert counts["head"] == 100 * 4 + 3 * (100 + 100)  # a rejects' object for each shard
    assert counts["put"] == 100 * (2 + 16) + 70_000 + 100 + 100 + 720 + 360
    assert counts["list"] == 4 + 100
    prices = load_prices(None)
    gets, puts = counts["get"] + counts["head"], counts["put"] + counts["list"]
    assert request_price(counts, prices) == pytest.approx(gets * 4e-7 + puts * 5e-6)


def test_requests_are_those_that_a_store_gets(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards by the stages' own functions, one of them with a reject, one S3 call at a time."""
    asked: Counter[str] = Counter()
    real = AioBaseClient._make_api_call

    async def count(self: Any, operation: str, arguments: Any) -> Any:
        asked[operation] += 1
        return await real(self, operation, arguments)

    storage = Storage(s3.options)
    members = {
        "in/a.tar": samples(6, seed=1),
        "in/b.tar": [("0.jpg", b"none"), *samples(4, seed=2)],
    }
    tars = {name: tar_bytes(content) for name, content in members.items()}
    url = s3.make_bucket(f"requests-{secrets.token_hex(4)}", tars)
    output = f"{url}/out"
    parts = PartSettings(storage, output, "run", {"cls": 6}, "float16", ())
    storage.publish_bytes(mark_url(output, parts.run), b"")
    chunks = tiles = 0
    monkeypatch.setattr(AioBaseClient, "_make_api_call", count)
    for name in tars:
        complete = compute_shard(
            Shard(f"{url}/{name}", name),
            ReadSettings(storage, ("jpg",)),
            TileSettings(TILING, (), 60.0, 8),
            encode,
            parts,
        )
        chunks += len(complete.parts)
        settings = FinalizeSettings(parts, "f" * 64, 1 << 30, lease=1)
        tiles += finalize_shard(complete, settings).tiles
    work = Work(2, sum(map(len, tars.values())), 10, tiles, 1, chunks)
    counts = requests(work, replace(COSTS, output_bytes_per_tile=100), 0.0, 1 << 30)
    found = {
        "get": asked["GetObject"],
        "head": asked["HeadObject"],
        "put": asked["PutObject"],
        "list": asked["ListObjectsV2"] + 4,  # of INPUT and of OUTPUT's folders, once a run
    }
    assert counts == found
    assert set(asked) == {"GetObject", "HeadObject", "PutObject", "ListObjectsV2", "DeleteObjects"}


def test_object_store_of_a_node() -> None:
    # 2 tiling tasks with a chunk each, and three chunks for each of 8 replicas
    assert object_store_bytes(77e6, 8, 2, 4, 1e6) == pytest.approx(26 * 77e6 + 4e6)
    # and of tokens one embedded chunk for each replica and each writing task
    tokens = object_store_bytes(12e6, 8, 2, 4, 1e6, 131e6)
    assert tokens == pytest.approx(26 * 12e6 + 4e6 + 12 * 131e6)


def test_output_bytes_are_those_of_a_real_run(tmp_path: Path, made: Path) -> None:
    """The trial's bytes a tile, against what the job itself writes for the same pictures."""
    images = [picture(60 + 20 * n, 90, seed=n) for n in range(6)]
    kept = [
        {"key": f"{n}", "member": f"{n}.jpg", "data": data, "txt": f"caption {n}"}
        for n, data in enumerate(images)
    ]
    members = [
        (f"{n}.{extension}", content)
        for n, data in enumerate(images)
        for extension, content in (("jpg", data), ("txt", f"caption {n}".encode()))
    ]
    from tests.builders import write_tar

    write_tar(tmp_path / "in/a.tar", members)
    (commit,) = extract_plainly(
        [tmp_path / "in"],
        tmp_path / "out",
        made / "ckpt",
        tiling="dynamic",
        max_tiles=4,
        features=("cls", "mean"),
        carry=("txt",),
    )
    settings = TileSettings(Tiling("dynamic", 56, 56, max_tiles=4), ("txt",), 60.0, 16)
    layout = Layout("parquet", {"cls": 80, "mean": 80}, "float16", ("txt",))
    trial = try_out(kept, settings, layout, lambda line: None)
    assert trial.tiles == commit.tiles
    written = sum(part.bytes for part in commit.parts)
    assert trial.output_bytes == pytest.approx(written, rel=0.01)
    assert trial.output_bytes > trial.tiles * 2 * 80 * 2  # two features in float16


@pytest.mark.parametrize("format_", ["webdataset", "npy"])
def test_a_trial_that_stops_writing_is_scaled_up(
    format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of all pictures of a plan would be gigabytes."""
    images = [picture(60 + 20 * n, 90, seed=n) for n in range(6)]
    kept = [{"key": f"{n}", "member": f"{n}.jpg", "data": d} for n, d in enumerate(images)]
    kept.append({"key": "x", "member": "x.jpg", "data": b"no picture"})
    settings = TileSettings(Tiling("dynamic", 56, 56, max_tiles=4), (), 60.0, 1)
    shape = (257, 800)
    layout = Layout(format_, {"tokens": shape}, "float16", ())
    whole = try_out(kept, settings, layout, lambda line: None)
    monkeypatch.setattr(trial_module, "WRITTEN_BYTES", 3 * layout.tile_bytes)
    part = try_out(kept, settings, layout, lambda line: None)
    assert (part.tiles, part.rejects, part.pictures) == (whole.tiles, whole.rejects, 7)
    assert part.rejects == {"decode/unidentified": 1}
    assert part.output_bytes == pytest.approx(whole.output_bytes, rel=0.05)
    assert whole.output_bytes > whole.tiles * layout.tile_bytes
