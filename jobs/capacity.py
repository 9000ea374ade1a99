"""How much of everything a job needs, and what each part of it can do: arithmetic alone.

A plan says how long; these say why. Figures from outside stand beside their source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.device_tables import Device, PriceTable
from model.config import ViTConfig
from model.errors import UserError
from model.split import check_ranks
from model.work import (
    activation_bytes,
    attention_flop,
    rank_flop,
    sums_seconds,
    weight_bytes,
)
from pipeline.local_files import BLOCK_BYTES
from pipeline.s3 import PART_BYTES, SINGLE_PUT_BYTES

# benchmarks/results/2026-11-24-bookkeeping-flow-cpu: 38 ms a shard of one chunk without any work
# in the stages; the driver alone takes 6-12 ms for each further task (docs/architecture.md).
SHARD_SECONDS, CHUNK_SECONDS = 0.038, 0.009
RAY_TASKS_IN_FLIGHT = 2  # of an actor, by default (ray.data.context)
CHUNKS_BEHIND_TILING = 1  # made, and not yet handed to a replica
MEMORY_SHARE = 0.9  # of a device, for weights and a pass
PLANNED_BATCH = 8  # tiles of a pass that must fit, and that the sums over ranks are reckoned with
LISTED_PER_PAGE = 1000
RENEW_SECONDS = 5.0  # of the lease (pipeline/lease.py): two GETs and one PUT
PROGRESS_SECONDS = 10.0  # of the record of progress: one PUT
TERA, GIGA = 1e12, 1e9
HOUR = 3600.0


@dataclass(frozen=True)
class Work:
    """What is to be done, over all of INPUT. `chunks` are those of the device's chunk size."""

    shards: int
    read_bytes: float
    pictures: float
    tiles: float
    rejects: float
    chunks: float


@dataclass(frozen=True)
class Costs:
    """CPU seconds of one core, and bytes of a tile's row in the output with all its features.

    `stream_bytes_per_second`: of one reader of the storage.
    """

    read_cpu_per_byte: float
    tile_cpu_per_tile: float
    write_cpu_per_tile: float
    stream_bytes_per_second: float
    output_bytes_per_tile: float
    commit_bytes: float
    objects_a_part: int = 1  # npy: an array a feature, and a table

    def cpu_seconds(self, work: Work) -> float:
        """Of all stages but the replicas."""
        a_tile = self.tile_cpu_per_tile + self.write_cpu_per_tile
        return work.read_bytes * self.read_cpu_per_byte + work.tiles * a_tile


def peak_seconds(config: ViTConfig, blocks: int, device: Device, ranks: int, dtype: str) -> float:
    """Seconds of a tile on the busiest rank at the device's peak; float32 by that of bfloat16.

    Raises:
        UserError: the device has no float8.
    """
    flop = rank_flop(config, ranks, blocks)
    if dtype != "fp8":
        return flop / (device.bf16_tflops * TERA)
    if device.fp8_tflops is None:
        raise UserError(f"dtype fp8: {device.name} has no float8; plan with bfloat16")
    attention = attention_flop(config, ranks, blocks)
    linear = (flop - attention) / (device.fp8_tflops * TERA)
    return linear + attention / (device.bf16_tflops * TERA)


def summing_seconds(config: ViTConfig, blocks: int, device: Device, ranks: int) -> float:
    """Seconds a tile of the sums over the ranks, which nothing overlaps."""
    link = device.link
    bandwidth, latency = link.gb_per_second * GIGA, link.step_microseconds * 1e-6
    return sums_seconds(config, ranks, blocks, bandwidth, latency, PLANNED_BATCH)


def replica_rate(
    config: ViTConfig, blocks: int, device: Device, ranks: int, dtype: str, share: float
) -> float:
    """Tiles a second of one replica over `ranks` devices that reach `share` of their peak."""
    check_ranks(config, ranks)
    computing = peak_seconds(config, blocks, device, ranks, dtype) / share
    return 1 / (computing + summing_seconds(config, blocks, device, ranks))


def fits(config: ViTConfig, device: Device, ranks: int, dtype: str) -> bool:
    """Whether a rank's weights and a pass over a few tiles lie in the device's memory."""
    item = 1.0 if dtype == "fp8" else 2.0
    needed = weight_bytes(config, ranks, item) + activation_bytes(config, ranks, PLANNED_BATCH)
    return needed <= MEMORY_SHARE * device.memory_gb * GIGA


def driver_seconds(work: Work, chunk_seconds: float = CHUNK_SECONDS) -> float:
    """Seconds that Ray and the driver take for themselves, whatever the stages do."""
    return work.shards * SHARD_SECONDS + max(0.0, work.chunks - work.shards) * chunk_seconds


def output_bytes(work: Work, costs: Costs) -> float:
    """Bytes of the embedding shards and the commits; rejects are a few hundred bytes each."""
    return work.tiles * costs.output_bytes_per_tile + work.shards * costs.commit_bytes


def output_objects(work: Work, costs: Costs, target_part_bytes: int) -> float:
    """Embedding objects: those of one part a shard, or of as many as its output is cut into."""
    a_shard = work.tiles * costs.output_bytes_per_tile / max(1, work.shards)
    return work.shards * max(1, math.ceil(a_shard / target_part_bytes)) * costs.objects_a_part


def requests(
    work: Work, costs: Costs, wall_seconds: float, target_part_bytes: int
) -> dict[str, float]:
    """Requests of the run to an object store, by kind, when nothing has to be asked for twice.

    A shard: two looks at it, its blocks of 8 MiB, its output (in parts above 64 MiB), its commit
    and two looks at the lease before that. Each object of its output: two looks at the lease before
    it and one at what arrived.
    A chunk: its part file, written once and read once. Once: the listings of INPUT and of OUTPUT's
    three folders. As time goes by: the lease and the record of progress.
    """
    shards, a_shard = max(1, work.shards), work.read_bytes / max(1, work.shards)
    objects = output_objects(work, costs, target_part_bytes)
    an_object = work.tiles * costs.output_bytes_per_tile / max(1.0, objects)
    uploads = 1 if an_object <= SINGLE_PUT_BYTES else 2 + math.ceil(an_object / PART_BYTES)
    with_rejects = min(shards, work.rejects)
    return {
        "get": shards * math.ceil(a_shard / BLOCK_BYTES)
        + work.chunks
        + 2 * wall_seconds / RENEW_SECONDS,
        "head": 4 * shards + 3 * (objects + with_rejects),
        "put": objects * uploads
        + work.chunks
        + shards
        + with_rejects
        + wall_seconds / RENEW_SECONDS
        + wall_seconds / PROGRESS_SECONDS,
        "list": 4 * math.ceil(shards / LISTED_PER_PAGE) + shards,  # its part files, to be removed
    }


def request_price(counts: dict[str, float], prices: PriceTable) -> float:
    """HEADs cost as GETs, LISTs as PUTs."""
    gets, puts = counts["get"] + counts["head"], counts["put"] + counts["list"]
    storage = prices.storage
    return gets / 1000 * storage.per_1000_gets + puts / 1000 * storage.per_1000_puts


def object_store_bytes(
    chunk_bytes: float,
    replicas: int,
    tile_tasks: float,
    io_tasks: int,
    group_bytes: float,
    embedded_bytes: float = 0.0,
) -> float:
    """Of one node: chunks that are cut, wait, or are embedded, groups that wait to be tiled, and
    embedded chunks that each replica has done or that are written."""
    chunks = tile_tasks + replicas * (RAY_TASKS_IN_FLIGHT + CHUNKS_BEHIND_TILING)
    embedded = (replicas + io_tasks) * embedded_bytes
    return chunks * chunk_bytes + io_tasks * group_bytes + embedded
