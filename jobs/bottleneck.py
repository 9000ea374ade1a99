"""What limits a job, and what to change: one or two plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.capacity import Costs, Work
from jobs.outcome import Outcome
from jobs.plan_document import Limit
from jobs.plan_options import Fleet

SHORT_RUN = 0.3  # share of the wall time that goes into the start
NARROW = 1.2  # the next limit is this near: worth a word
SMALL_SHARD_TILES = 1000


@dataclass(frozen=True)
class Case:
    """What is judged. `fewer`: an option that gives fewer tiles, said as part of a sentence."""

    outcome: Outcome
    fleet: Fleet
    work: Work
    costs: Costs
    resize: str
    fewer: str | None = None


def advice(case: Case) -> list[str]:
    """The limit that counts comes first."""
    outcome, fleet = case.outcome, case.fleet
    ordered = sorted(outcome.limits, key=lambda limit: limit.tiles_per_second)
    first, following = ordered[0], ordered[1]
    sentences = {
        "encoder": _encoder,
        "tiling": _tiling,
        "driver": _driver,
        "storage": _storage,
    }[first.name](case, first)
    if following.tiles_per_second < NARROW * first.tiles_per_second and not fleet.is_cpu:
        sentences.append(
            f"Next comes {_spoken(following.name)} at {following.tiles_per_second:,.0f} tiles/s: "
            "with more than that many it is the limit."
        )
    if outcome.start_seconds > SHORT_RUN * outcome.wall_seconds:
        sentences.append(
            f"The start takes {outcome.start_seconds:.0f} of {outcome.wall_seconds:.0f} s: more "
            "devices hardly shorten a run as small as this."
        )
    return sentences


def _spoken(name: str) -> str:
    return {"encoder": "the encoder", "driver": "the driver"}.get(name, name)


def _encoder(case: Case, limit: Limit) -> list[str]:
    if case.fleet.is_cpu:
        sentence = (
            f"The encoder is the limit: {limit.tiles_per_second:.1f} tiles/s on these cores. "
            "GPUs, or a smaller checkpoint, shorten the run"
        )
    else:
        others = min(
            entry.tiles_per_second for entry in case.outcome.limits if entry.name != "encoder"
        )
        most = math.floor(case.fleet.count * others / limit.tiles_per_second)
        sentence = (
            f"The encoder is the limit, as it should be: {case.fleet} embed "
            f"{limit.tiles_per_second:,.0f} tiles/s. More devices shorten the run in proportion, "
            f"up to about {most:,} of them, at the same price"
        )
    return [f"{sentence}; {case.fewer}." if case.fewer else f"{sentence}."]


def _tiling(case: Case, limit: Limit) -> list[str]:
    changes = [] if case.resize == "fast" else ["--resize fast cuts about three times as fast"]
    if case.fleet.is_cpu:
        changes.append(case.fewer or "more cores shorten the run")
        return [
            f"Tiling is the limit: {limit.tiles_per_second:.1f} tiles/s on these cores, and the "
            f"replicas starve; {', and '.join(changes)}."
        ]
    encoder = _limit(case.outcome.limits, "encoder")
    cores = case.outcome.cores or 0.0
    wanted = encoder.tiles_per_second * case.costs.cpu_seconds(case.work) / max(case.work.tiles, 1)
    changes.append(
        f"workers without GPUs, about {max(1, math.ceil(wanted - cores)):,} cores more, feed them"
    )
    return [
        f"Tiling is the limit: {cores:,.0f} cores cut {limit.tiles_per_second:,.0f} tiles/s, and "
        f"the devices could embed {encoder.tiles_per_second:,.0f}; {', and '.join(changes)}."
    ]


def _driver(case: Case, limit: Limit) -> list[str]:
    others = min(entry.tiles_per_second for entry in case.outcome.limits if entry.name != "driver")
    tiles_a_shard = case.work.tiles / max(1, case.work.shards)
    sentences = [
        f"The driver is the limit: with Ray's bookkeeping for each shard and chunk it comes to "
        f"{limit.tiles_per_second:,.0f} tiles/s; run {math.ceil(others / limit.tiles_per_second)} "
        "jobs over slices of the shards, each with its own OUTPUT."
    ]
    if tiles_a_shard < SMALL_SHARD_TILES:
        sentences.append(
            f"Or make shards larger: these have {tiles_a_shard:,.0f} tiles each, and 1,000 to "
            "10,000 pictures are usual."
        )
    return sentences


def _storage(case: Case, limit: Limit) -> list[str]:
    return [
        f"Reading is the limit: {limit.detail}. Run next to the bucket, in its region; where that "
        "is done already, use more nodes, so that more shards are read at once."
    ]


def _limit(limits: Sequence[Limit], name: str) -> Limit:
    return next(limit for limit in limits if limit.name == name)
