"""The choices of a job side by side: tilings, devices, and models split over several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.capacity import Work
from jobs.evidence import Evidence, Way, WayTotals
from jobs.outcome import CPU_CHUNK_TILES, GPU_CHUNK_TILES, Setting, outcome
from jobs.plan_document import Comparison, Option
from jobs.plan_options import CPU, Fleet
from jobs.terminal import clock
from model.errors import UserError

RANKS = (1, 2, 4, 8)
USUAL_COUNT = 8
ENOUGH = 0.9  # a tiling with fewer tiles than this share is worth a word


@dataclass(frozen=True)
class Asked:
    """What the plan is for: the first fleet, and how it is used."""

    fleets: tuple[Fleet, ...]
    ranks: int
    replicas: int | None

    @property
    def fleet(self) -> Fleet:
        return self.fleets[0]


def work_of(evidence: Evidence, totals: WayTotals, fleet: Fleet) -> Work:
    """What is to be done by one way of tiling, in chunks of the size that the fleet's have."""
    chunk = CPU_CHUNK_TILES if fleet.is_cpu else GPU_CHUNK_TILES
    return Work(
        shards=evidence.shards,
        read_bytes=float(evidence.read_bytes),
        pictures=evidence.pictures.value,
        tiles=totals.tiles.value,
        rejects=evidence.rejects.value,
        chunks=max(totals.chunks[chunk], float(evidence.shards)),
    )


def compare(asked: Asked, evidence: Evidence, setting: Setting) -> tuple[Comparison, ...]:
    tables = [
        _devices(asked, evidence, setting),
        _ranks(asked, evidence, setting),
        *_ways(asked, evidence, setting),
    ]
    return tuple(table for table in tables if table.options)


def _devices(asked: Asked, evidence: Evidence, setting: Setting) -> Comparison:
    """The fleets that were asked for, and as many of every other device."""
    count = USUAL_COUNT if asked.fleet.is_cpu else asked.fleet.count
    fleets = list(asked.fleets)
    fleets += [Fleet(count, device.name) for device in setting.devices.devices]
    if setting.cpu is not None:
        fleets.append(Fleet(1, CPU))
    fleets = list(dict.fromkeys(fleets))
    options = tuple(
        option(
            str(fleet),
            fleet == asked.fleet,
            replace(asked, fleets=(fleet,)),
            work_of(evidence, evidence.asked, fleet),
            setting,
        )
        for fleet in fleets
    )
    return Comparison(title="fleet", options=options)


def _ranks(asked: Asked, evidence: Evidence, setting: Setting) -> Comparison:
    """On the first GPU fleet; cpu has no other devices to split a model over."""
    fleet = next((fleet for fleet in asked.fleets if not fleet.is_cpu), None)
    if fleet is None:
        return Comparison(title="", options=())
    work = work_of(evidence, evidence.asked, fleet)
    sizes = sorted({*RANKS, asked.ranks})
    options = tuple(
        option(
            str(size),
            size == asked.ranks and fleet == asked.fleet,
            Asked((fleet,), size, None if size != asked.ranks else asked.replicas),
            work,
            setting,
        )
        for size in sizes
    )
    return Comparison(title=f"tensor_parallel on {fleet}", options=options)


def _ways(asked: Asked, evidence: Evidence, setting: Setting) -> list[Comparison]:
    """Tilings on the first fleet: other numbers of tiles, other limits of enlargement."""
    first = next(iter(evidence.ways))
    by_tiles = [w for w in evidence.ways if w.max_upscale == first.max_upscale]
    by_upscale = [w for w in evidence.ways if w.max_tiles == first.max_tiles or w is first]
    if first.tiling != "dynamic":
        by_tiles = []
        by_upscale = list(evidence.ways)
    tables = []
    for title, ways in (
        ("max_tiles", sorted(by_tiles, key=lambda way: way.max_tiles)),
        ("max_upscale", sorted(by_upscale, key=_upscale)),
    ):
        if len(ways) < 2:
            continue
        options = tuple(
            option(
                _label(way, title),
                way == first,
                asked,
                work_of(evidence, evidence.ways[way], asked.fleet),
                setting,
            )
            for way in ways
        )
        tables.append(Comparison(title=title, options=options))
    return tables


def _upscale(way: Way) -> tuple[bool, float]:
    return way.tiling == "dynamic", -(way.max_upscale or float("inf"))


def _label(way: Way, title: str) -> str:
    if way.tiling != "dynamic":
        return way.tiling
    upscale = "none" if way.max_upscale is None else f"{way.max_upscale:g}"
    return str(way.max_tiles) if title == "max_tiles" else upscale


def option(label: str, chosen: bool, asked: Asked, work: Work, setting: Setting) -> Option:
    """One line; where the fleet cannot do it, with the reason and no number."""
    try:
        found = outcome(asked.fleet, asked.ranks, asked.replicas, work, setting)
    except UserError as error:
        return Option(label=label, chosen=chosen, tiles=work.tiles, note=str(error))
    note: str = found.rate.basis
    if clock(found.low_seconds) != clock(found.high_seconds):
        note += f", {clock(found.low_seconds)} to {clock(found.high_seconds)}"
    return Option(
        label=label,
        chosen=chosen,
        tiles=work.tiles,
        device_hours=found.device_hours,
        price=found.price,
        wall_seconds=found.wall_seconds,
        bottleneck=found.bottleneck,
        note=note,
    )


def fewer_tiles(ways: Sequence[tuple[Way, WayTotals]]) -> str | None:
    """Words for the mildest option that gives clearly fewer tiles than the first."""
    (first, asked), *others = ways
    if first.tiling != "dynamic" or not asked.tiles.value:
        return None
    milder = sorted(
        (
            (way.max_upscale, totals.tiles.value / asked.tiles.value)
            for way, totals in others
            if way.max_upscale is not None and way.max_tiles == first.max_tiles
        ),
        reverse=True,
    )
    for upscale, share in milder:
        if share < ENOUGH:
            return f"--max-upscale {upscale:g} would leave {share:.0%} of the tiles"
    return None
