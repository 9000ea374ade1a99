"""`tessera plan`: what a job will take, before it is started."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from jobs.benchmark_rate import read_benchmark
from jobs.bottleneck import Case, advice
from jobs.capacity import Work, output_bytes, output_objects, requests
from jobs.comparisons import Asked, compare, fewer_tiles, work_of
from jobs.cpu_rate import measure, shared_rate
from jobs.device_rates import with_measured
from jobs.device_tables import load_devices, load_prices
from jobs.evidence import Evidence, chunk_sizes, layout_by, look, tiling_by
from jobs.outcome import CPU_CHUNK_TILES, CpuRun, Outcome, Setting, outcome
from jobs.plan_document import (
    Capacity,
    Chosen,
    Interval,
    Network,
    Plan,
    Price,
    Rate,
)
from jobs.plan_document import Fleet as FleetNote
from jobs.plan_options import Fleet, PlanConfig
from jobs.plan_request import cpu_replicas, find_fleets, find_network, wants_cpu
from jobs.run_evidence import cpu_of, devices_of, evidence_of, read_run, settings_of
from jobs.sampling import Estimate
from jobs.stage_clock import EncodeJob, TileJob
from model.config import Preprocessor
from model.errors import UserError
from pipeline.cpus import usable_cpus
from pipeline.storage import Storage, redact

BUSY = 0.5  # load a core above which what is measured here is worth a warning
DEVICE_BYTES = 3  # of a pixel


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plan(config: PlanConfig, given: frozenset[str] = frozenset()) -> Plan:
    """Plans a job. `given`: options that were typed, which --from may not contradict.

    Raises:
        UserError: the plan cannot be made; one line says why.
    """
    storage = Storage(config.storage_options, config.deadline_seconds)
    devices, prices = load_devices(config.devices), load_prices(config.prices)
    run = None
    if config.from_output is not None:
        run = read_run(config.from_output, config.seed, storage)
        config = settings_of(config, run, given)
    network, shape, preprocessor, notes = find_network(config, run)
    if config.benchmark is not None:
        device, measured = read_benchmark(config.benchmark, devices, config.dtype)
        devices = with_measured(devices, device, measured)
    if run is not None:
        devices = devices_of(run, devices, network.tflop_per_tile)
    asked = find_fleets(config, network, run, devices)
    if run is not None:
        evidence = evidence_of(config, run, storage)
        cpu = cpu_of(run, cpu_replicas(config))
    else:
        notes += _busy()
        evidence = look(config, storage, shape, preprocessor, say)
        cpu = None
        if wants_cpu(asked):
            chunk = chunk_sizes(layout_by(config, shape, preprocessor))[CPU_CHUNK_TILES]
            cpu = _measure_cpu(config, evidence, preprocessor, chunk)
    setting = Setting(
        config=shape,
        blocks=network.blocks,
        tile_size=network.tile_size,
        dtype=config.dtype,
        devices=devices,
        prices=prices,
        costs=evidence.costs,
        target_part_bytes=int(config.target_part_bytes),
        cpu=cpu,
    )
    return _document(config, asked, evidence, setting, network, [*notes, *evidence.notes])


def _measure_cpu(
    config: PlanConfig, evidence: Evidence, preprocessor: Preprocessor, chunk_tiles: int
) -> CpuRun:
    if config.model is None:
        raise UserError(
            "fleet cpu: the speed of a CPU is measured with the checkpoint itself; give --model"
        )
    replicas = cpu_replicas(config)
    tiling = tiling_by(next(iter(evidence.ways)), config, preprocessor)
    tile = TileJob((), asdict(tiling), config.carry, config.deadline_seconds, chunk_tiles)
    encode = EncodeJob(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        attention=config.attention,
        layer=config.layer,
        features=config.features,
        embedding_dtype=config.embedding_dtype,
        batch_tiles=config.batch_tiles,
        threads=max(1, usable_cpus() // replicas),
        chunk_tiles=chunk_tiles,
    )
    rates = measure(evidence.kept, tile, encode, replicas, usable_cpus(), say)
    source = f"{replicas} replicas and {usable_cpus()} tiling tasks on {usable_cpus()} cores here"
    return CpuRun(rates, usable_cpus(), replicas, "measured", f"{source}; {rates.detail}")


def _busy() -> list[str]:
    load, number = os.getloadavg()[0], usable_cpus()
    if load <= BUSY * number:
        return []
    note = (
        f"this machine was busy (load {load:.1f} on {number} cores) when its speed was measured: "
        "figures marked measured may be too low"
    )
    say(f"warning: {note}")
    return [note]


def _document(
    config: PlanConfig,
    asked: Asked,
    evidence: Evidence,
    setting: Setting,
    network: Network,
    notes: list[str],
) -> Plan:
    fleet = asked.fleet
    work = work_of(evidence, evidence.asked, fleet)
    found = outcome(fleet, asked.ranks, asked.replicas, work, setting)
    counts = requests(work, setting.costs, found.wall_seconds, setting.target_part_bytes)
    written = output_bytes(work, setting.costs)
    case = Case(
        found,
        fleet,
        work,
        setting.costs,
        config.resize,
        fewer_tiles(list(evidence.ways.items())),
    )
    return Plan(
        tessera_version=version("tessera"),
        input=tuple(map(redact, config.input)),
        settings=settings_note(config),
        network=network,
        sample=evidence.sample,
        pictures=_interval(evidence.pictures),
        tiles=_interval(evidence.asked.tiles),
        rejects=_interval(evidence.rejects),
        wall_seconds=_wall(found, evidence.asked.tiles),
        rates=(*evidence.rates, *_encoder_rates(found, fleet, setting)),
        fleet=FleetNote(
            name=str(fleet),
            device=fleet.device,
            count=fleet.count,
            replicas=found.replicas,
            tensor_parallel=asked.ranks,
            cores=found.cores,
        ),
        limits=found.limits,
        bottleneck=found.bottleneck,
        advice=tuple(advice(case)),
        capacity=_capacity(found, work, setting, counts, fleet),
        price=Price(
            currency=setting.prices.currency,
            date=setting.prices.date,
            devices=found.device_price,
            requests=found.request_price,
            storage_per_month=written / 1e9 * setting.prices.storage.per_gb_month,
        ),
        comparisons=compare(asked, evidence, setting),
        notes=(*notes, *_unknown_cores(found, fleet)),
        chosen=Chosen(
            pictures=work.pictures,
            tiles=work.tiles,
            rejects=work.rejects,
            read_bytes=work.read_bytes,
            output_bytes=written,
            requests=sum(counts.values()),
            device_hours=found.device_hours,
            wall_seconds=found.wall_seconds,
            tiles_per_second=work.tiles / found.wall_seconds,
            tile_counts={str(n): pictures for n, pictures in evidence.tile_counts.items()},
        ),
    )


def _unknown_cores(found: Outcome, fleet: Fleet) -> list[str]:
    if found.cores is not None:
        return []
    return [
        f"the table of prices does not tell the cores of {fleet.device} machines: neither tiling "
        "nor the storage's readers are among the limits; give them with --prices"
    ]


def settings_note(config: PlanConfig) -> dict[str, Any]:
    names = (
        "tiling", "max_tiles", "thumbnail", "max_upscale", "resize", "layer", "format",
        "embedding_dtype", "dtype",
    )  # fmt: skip
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    return {**settings, "features": ",".join(config.features), "carry": ",".join(config.carry)}


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def _wall(found: Outcome, tiles: Estimate) -> Interval:
    """By the interval of the tiles, and the range of what is assumed of a device."""
    if tiles.low is None or tiles.high is None or not tiles.value:
        return Interval(value=found.wall_seconds, low=None, high=None)
    start = found.start_seconds
    low = start + (found.low_seconds - start) * tiles.low / tiles.value
    high = start + (found.high_seconds - start) * tiles.high / tiles.value
    return Interval(value=found.wall_seconds, low=low, high=high)


def _encoder_rates(found: Outcome, fleet: Fleet, setting: Setting) -> list[Rate]:
    if fleet.is_cpu:
        assert setting.cpu is not None
        rates = setting.cpu.rates
        return [
            Rate(
                name=name,
                value=value,
                unit="tiles/s",
                basis=setting.cpu.basis,
                source=setting.cpu.source,
            )
            for name, value in (
                ("encoder alone", rates.encode_alone),
                ("encoder beside tiling", rates.encode_beside),
                ("tiling beside the encoder", rates.tile_beside),
                ("both, sharing the cores", shared_rate(rates)),
            )
        ]
    return [
        Rate(
            name="encoder",
            value=found.rate.middle,
            unit=f"tiles/s a {fleet.device}",
            basis=found.rate.basis,
            source=found.rate.source,
        )
    ]


def _capacity(
    found: Outcome, work: Work, setting: Setting, counts: dict[str, float], fleet: Fleet
) -> Capacity:
    side = setting.tile_size
    return Capacity(
        cores_per_device=None if fleet.is_cpu else found.cores_needed / fleet.count,
        cores_needed=found.cores_needed,
        object_store_bytes=found.object_store_bytes,
        chunk_bytes=work.tiles / max(work.chunks, 1) * side * side * DEVICE_BYTES,
        read_bytes_per_second=work.read_bytes / found.wall_seconds,
        requests=counts,
        output_objects=output_objects(work, setting.costs, setting.target_part_bytes),
    )
