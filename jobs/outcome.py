"""What comes of a job on a fleet: how long, what limits it, what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.capacity import (
    HOUR,
    Costs,
    Work,
    driver_seconds,
    fits,
    object_store_bytes,
    request_price,
    requests,
)
from jobs.cpu_rate import CpuRates, shared_rate
from jobs.device_rates import DeviceRate, device_rate
from jobs.device_tables import DeviceTable, PriceTable
from jobs.plan_document import Basis, Limit
from jobs.plan_options import Fleet
from model.config import ViTConfig
from model.errors import UserError
from pipeline.samples import GROUP_BYTES

GPU_CHUNK_TILES, CPU_CHUNK_TILES = 128, 32  # jobs/cluster.py, which imports Ray
CPU_BUFFER_BYTES = 256 << 20
LEAST_IO_TASKS, MOST_IO_TASKS = 2, 64  # jobs/cluster.py: a quarter of the CPUs
# Of a local run. Beside its replica's own start (4 s there): the command, Ray, the first workers,
# the end; a run of 27 tiles took 11.6 s (2026-11-24, two cores). For each chunk: its 19 MB handed
# over, and Ray's own processes, which interrupt the replica; fitted to the 145.6 s of
# benchmarks/results/2026-11-23-end-to-end-cpu (9000 tiles, 333 chunks) with the rates of 2026-11-24
# on the same machine (alone 94 and 738 tiles/s, together 71 and 222).
LOCAL_RUN_SECONDS, LOCAL_CHUNK_SECONDS = 8.0, 0.088


@dataclass(frozen=True)
class CpuRun:
    """A run on this machine's cores: what was measured, or what a run's commits tell."""

    rates: CpuRates
    cores: int
    replicas: int
    basis: Basis
    source: str


@dataclass(frozen=True)
class Setting:
    """What all outcomes of a plan have in common."""

    config: ViTConfig
    blocks: int
    tile_size: int
    dtype: str
    devices: DeviceTable
    prices: PriceTable
    costs: Costs
    target_part_bytes: int
    cpu: CpuRun | None


@dataclass(frozen=True)
class Outcome:
    """`low_seconds` and `high_seconds` come from the range of the encoder's rate alone."""

    replicas: int
    devices: int
    cores: float | None
    wall_seconds: float
    low_seconds: float
    high_seconds: float
    start_seconds: float
    rate: DeviceRate
    limits: tuple[Limit, ...]
    device_price: float | None
    request_price: float
    object_store_bytes: float
    cores_needed: float

    @property
    def device_hours(self) -> float:
        return self.devices * self.wall_seconds / HOUR

    @property
    def price(self) -> float | None:
        return None if self.device_price is None else self.device_price + self.request_price

    @property
    def bottleneck(self) -> str:
        return min(self.limits, key=lambda limit: limit.tiles_per_second).name

    @property
    def tiles_per_second(self) -> float:
        return min(limit.tiles_per_second for limit in self.limits)


def outcome(
    fleet: Fleet, ranks: int, replicas: int | None, work: Work, setting: Setting
) -> Outcome:
    """Raises UserError, one line, where the fleet cannot do it."""
    if fleet.is_cpu:
        return _on_cpu(work, setting)
    return _on_devices(fleet, ranks, replicas, work, setting)


def _on_devices(
    fleet: Fleet, ranks: int, replicas: int | None, work: Work, setting: Setting
) -> Outcome:
    device = setting.devices.find(fleet.device)
    if not fits(setting.config, device, ranks, setting.dtype):
        raise UserError(
            f"tensor_parallel {ranks}: the model does not fit into {device.memory_gb:g} GB of an "
            f"{device.name}; split it over more, or take a larger one"
        )
    room = _room(fleet.count, device.per_node, ranks)
    if not room:
        raise UserError(
            f"tensor_parallel {ranks}: {fleet} has no node with that many devices (at most "
            f"{min(device.per_node, fleet.count)}); use less"
        )
    number = min(room, replicas or room)
    share = setting.devices.share_of_peak
    rate = device_rate(device, share, setting.config, setting.blocks, setting.dtype, ranks)
    price = setting.prices.devices.get(device.name)
    cores = None if price is None or price.cores is None else price.cores * fleet.count
    start = setting.devices.start_seconds.value

    def limits_at(a_device: float) -> tuple[Limit, ...]:
        encoder = Limit(
            name="encoder",
            tiles_per_second=number * ranks * a_device,
            detail=f"{number} replicas of {ranks} {device.name}, {ranks * a_device:.3g} tiles/s "
            f"each",
        )
        driver = _driver_limit(work)
        if cores is None:  # what tiles and reads is not known
            return (encoder, driver)
        tiling = _tiling_limit(work, setting.costs, cores)
        return (encoder, tiling, driver, _storage_limit(work, setting.costs, _io_tasks(cores)))

    seconds = [
        start + work.tiles / min(limit.tiles_per_second for limit in limits_at(a_device))
        for a_device in (rate.high, rate.middle, rate.low)
    ]
    limits = limits_at(rate.middle)
    a_node = min(fleet.count, device.per_node)
    # To keep the devices busy, whatever else may be the limit now.
    needed = setting.costs.cpu_seconds(work) / max(work.tiles, 1) * number * ranks * rate.middle
    tiling = needed if cores is None else min(needed, cores)
    chunk_bytes = _chunk_bytes(work, setting)
    return Outcome(
        replicas=number,
        devices=fleet.count,
        cores=cores,
        wall_seconds=seconds[1],
        low_seconds=seconds[0],
        high_seconds=seconds[2],
        start_seconds=start,
        rate=rate,
        limits=limits,
        device_price=None if price is None else fleet.count * price.per_hour * seconds[1] / HOUR,
        request_price=_request_price(work, seconds[1], setting),
        object_store_bytes=object_store_bytes(
            chunk_bytes,
            max(1, round(number * a_node / fleet.count)),
            tiling * a_node / fleet.count,
            _io_tasks((needed if cores is None else cores) * a_node / fleet.count),
            min(GROUP_BYTES, 128 * work.read_bytes / max(work.pictures, 1)),
            work.tiles / max(work.chunks, 1) * setting.costs.output_bytes_per_tile,
        ),
        cores_needed=needed,
    )


def _on_cpu(work: Work, setting: Setting) -> Outcome:
    """On a local cluster all share the cores: what cannot go on at the same time adds up."""
    cpu = setting.cpu
    if cpu is None:
        raise UserError(
            "fleet cpu: the speed of this machine is not known; give --model, the folder of a "
            "checkpoint that it can hold"
        )
    rates, costs = cpu.rates, setting.costs
    both = shared_rate(rates)
    io_seconds = (
        work.read_bytes * costs.read_cpu_per_byte + work.tiles * costs.write_cpu_per_tile
    ) / cpu.cores
    start = LOCAL_RUN_SECONDS + rates.load_seconds
    ray_seconds = driver_seconds(work, LOCAL_CHUNK_SECONDS)
    busy = work.tiles / both + io_seconds + ray_seconds
    tiling_limited = rates.tile_beside < rates.encode_beside
    limits = (
        Limit(
            name="encoder",
            tiles_per_second=rates.encode_alone if tiling_limited else both,
            detail=f"{rates.encode_alone:.3g} tiles/s alone, {rates.encode_beside:.3g} beside "
            f"tiling on {cpu.cores} cores",
        ),
        Limit(
            name="tiling",
            tiles_per_second=both if tiling_limited else rates.tile_alone,
            detail=f"{rates.tile_alone:.3g} tiles/s alone, {rates.tile_beside:.3g} beside the "
            f"replica",
        ),
        _driver_limit(work),
        _storage_limit(work, costs, LEAST_IO_TASKS),
    )
    wall = start + busy
    return Outcome(
        replicas=cpu.replicas,
        devices=1,
        cores=float(cpu.cores),
        wall_seconds=wall,
        low_seconds=wall,
        high_seconds=wall,
        start_seconds=start,
        rate=DeviceRate(both, both, both, cpu.basis, cpu.source),
        limits=limits,
        device_price=_cpu_price(setting, wall),
        request_price=_request_price(work, wall, setting),
        object_store_bytes=float(CPU_BUFFER_BYTES),
        cores_needed=float(cpu.cores),
    )


def _cpu_price(setting: Setting, wall_seconds: float) -> float | None:
    """A table of the user's may have a price for `cpu`: of this machine."""
    price = setting.prices.devices.get("cpu")
    return None if price is None else price.per_hour * wall_seconds / HOUR


def _driver_limit(work: Work) -> Limit:
    return Limit(
        name="driver",
        tiles_per_second=work.tiles / max(driver_seconds(work), 1e-9),
        detail=f"{work.tiles / max(work.shards, 1):.3g} tiles a shard, "
        f"{work.tiles / max(work.chunks, 1):.3g} a chunk",
    )


def _tiling_limit(work: Work, costs: Costs, cores: float) -> Limit:
    a_tile = max(costs.cpu_seconds(work) / max(work.tiles, 1e-9), 1e-12)
    return Limit(
        name="tiling",
        tiles_per_second=cores / a_tile,
        detail=f"{cores:g} cores, {1 / a_tile:.3g} tiles/s each with reading and writing",
    )


def _storage_limit(work: Work, costs: Costs, streams: int) -> Limit:
    bandwidth = streams * costs.stream_bytes_per_second
    a_tile_bytes = work.read_bytes / max(work.tiles, 1e-9)
    return Limit(
        name="storage",
        tiles_per_second=bandwidth / max(a_tile_bytes, 1e-9),
        detail=f"{streams} readers of {costs.stream_bytes_per_second / 1e6:.3g} MB/s each, as "
        f"read from here; {a_tile_bytes / 1e3:.3g} kB a tile",
    )


def _io_tasks(cores: float) -> int:
    return max(LEAST_IO_TASKS, min(MOST_IO_TASKS, int(cores) // 4))


def _room(count: int, per_node: int, ranks: int) -> int:
    """Replicas that fit, none of them over two nodes."""
    nodes, rest = divmod(count, per_node)
    return nodes * (per_node // ranks) + rest // ranks


def _chunk_bytes(work: Work, setting: Setting) -> float:
    side = setting.tile_size
    return work.tiles / max(work.chunks, 1) * side * side * 3


def _request_price(work: Work, wall_seconds: float, setting: Setting) -> float:
    counts = requests(work, setting.costs, wall_seconds, setting.target_part_bytes)
    return request_price(counts, setting.prices)
