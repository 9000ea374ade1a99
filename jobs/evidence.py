"""What a plan rests on: a sample of INPUT read and tried out here, or the commits of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from jobs.capacity import Costs
from jobs.config import tiling_of
from jobs.outcome import CPU_CHUNK_TILES, GPU_CHUNK_TILES
from jobs.plan_document import Rate, SampleNote
from jobs.plan_options import PlanConfig
from jobs.sampling import Estimate, Z, choose, estimate_total, none_seen
from jobs.survey import Survey, survey
from jobs.trial import Trial, try_out
from model.config import Preprocessor, ViTConfig
from model.errors import UserError
from model.feature_shapes import feature_shape
from pipeline.chunks import TileSettings, chunk_tiles
from pipeline.generations import part_paths
from pipeline.layout import Layout
from pipeline.records import Shape, Shard
from pipeline.samples import ReadSettings
from pipeline.shard_sizes import shard_sizes
from pipeline.shards import list_shards
from pipeline.storage import Storage
from pipeline.tiling import Tiling

COMPARED_TILES = (1, 6, 12, 24)
COMPARED_UPSCALES = (None, 2.0, 1.5, 1.0)
LEAST_PICTURES = 1
FASTEST_STREAM = 2e9  # bytes a second; a page cache may seem endless


@dataclass(frozen=True)
class Way:
    """One way of tiling, by the options that say so."""

    tiling: str
    max_tiles: int
    max_upscale: float | None


@dataclass(frozen=True)
class WayTotals:
    """Totals over INPUT of one way; `chunks`: tiles of a chunk → number."""

    tiles: Estimate
    chunks: dict[int, float]


@dataclass(frozen=True)
class Evidence:
    """`ways` begins with the one that was asked for. `shards` are those of INPUT that are there."""

    shards: int
    read_bytes: int
    pictures: Estimate
    rejects: Estimate
    tile_counts: dict[int, float]
    ways: dict[Way, WayTotals]
    costs: Costs
    sample: SampleNote
    rates: list[Rate]
    notes: list[str] = field(default_factory=list)
    kept: list[dict[str, object]] = field(default_factory=list)

    @property
    def asked(self) -> WayTotals:
        return next(iter(self.ways.values()))


@dataclass(frozen=True)
class Input:
    """The shards of INPUT that are there, with their sizes."""

    shards: list[tuple[Shard, int]]
    missing: int

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.shards)


def list_input(config: PlanConfig, storage: Storage) -> Input:
    """Raises UserError where there is nothing to plan."""
    listed = list_shards(config.input, storage)
    sizes = shard_sizes(listed, storage)
    there = [(shard, size) for shard, size in zip(listed, sizes, strict=True) if size]
    if not there:
        raise UserError(
            f"plan: none of the {len(listed)} shards of INPUT is there; check its bucket or folder"
        )
    return Input(there, len(listed) - len(there))


def ways_of(config: PlanConfig) -> list[Way]:
    """The way that was asked for, then those it is compared with."""
    asked = Way(config.tiling, config.max_tiles, config.max_upscale)
    ways = [asked]
    if config.tiling == "dynamic":
        ways += [Way("dynamic", tiles, config.max_upscale) for tiles in COMPARED_TILES]
        ways += [Way("dynamic", config.max_tiles, upscale) for upscale in COMPARED_UPSCALES]
    else:
        ways += [Way("dynamic", 12, upscale) for upscale in COMPARED_UPSCALES]
    return list(dict.fromkeys(ways))


def tiling_by(way: Way, config: PlanConfig, preprocessor: Preprocessor) -> Tiling:
    options = config.model_copy(
        update={
            "tiling": way.tiling,
            "max_tiles": way.max_tiles,
            "max_upscale": way.max_upscale,
        }
    )
    return tiling_of(options, preprocessor.crop, preprocessor.resize_to)


def look(
    config: PlanConfig,
    storage: Storage,
    network: ViTConfig,
    preprocessor: Preprocessor,
    say: Callable[[str], None],
) -> Evidence:
    """Reads a sample of INPUT's shards and tries some of its pictures out on this machine."""
    found = list_input(config, storage)
    chosen = [
        found.shards[at] for at in choose(len(found.shards), config.sample_shards, config.seed)
    ]
    ways = ways_of(config)
    layout = layout_by(config, network, preprocessor)
    sizes = chunk_sizes(layout)
    read = ReadSettings(storage, config.image_key, config.carry, config.accept_truncated)
    looked = survey(
        chosen,
        read,
        [tiling_by(way, config, preprocessor) for way in ways],
        tuple(sizes.values()),
        config.max_reject_rate,
        config.sample_pictures,
        config.seed,
        say,
    )
    if len(looked.kept) < LEAST_PICTURES:
        broken = [count for count in looked.shards if count.failure]
        why = f": {broken[0].failure}" if broken else f" with one of {', '.join(config.image_key)}"
        raise UserError(
            f"plan: no picture in the {len(chosen)} shards of the sample{why}; look at INPUT, or "
            "read more of it (--sample-shards)"
        )
    settings = TileSettings(
        tiling_by(ways[0], config, preprocessor),
        config.carry,
        config.deadline_seconds,
        sizes[CPU_CHUNK_TILES],
    )
    trial = try_out(looked.kept, settings, layout, say)
    return _evidence(config, found, looked, trial, ways, layout)


def layout_by(config: PlanConfig, network: ViTConfig, preprocessor: Preprocessor) -> Layout:
    features: dict[str, Shape] = {
        name: feature_shape(name, network, preprocessor.crop) for name in config.features
    }
    return Layout(config.format, features, config.embedding_dtype, config.carry)


def chunk_sizes(layout: Layout) -> dict[int, int]:
    """Tiles of a chunk as they are bounded by their features, by the number without a bound."""
    return {
        most: chunk_tiles(most, layout.tile_bytes, device)
        for most, device in ((CPU_CHUNK_TILES, "cpu"), (GPU_CHUNK_TILES, "cuda"))
    }


def _evidence(
    config: PlanConfig,
    found: Input,
    looked: Survey,
    trial: Trial,
    ways: Sequence[Way],
    layout: Layout,
) -> Evidence:
    sizes = [count.num_bytes for count in looked.shards]
    num_shards, total_bytes = len(found.shards), found.total_bytes

    def total(counted: Sequence[float]) -> Estimate:
        return estimate_total(counted, sizes, num_shards, total_bytes)

    header_rejects = total([count.rejects.total() for count in looked.shards])
    pictures = total([count.ways[0].pictures for count in looked.shards])
    totals = {
        way: WayTotals(
            _decoded(total([count.ways[at].tiles for count in looked.shards]), trial),
            {
                most: total([count.ways[at].chunks[tiles] for count in looked.shards]).value
                for most, tiles in chunk_sizes(layout).items()
            },
        )
        for at, way in enumerate(ways)
    }
    seen = sum(sizes)
    counts: Counter[int] = sum((count.ways[0].tile_counts for count in looked.shards), Counter())
    headers = counts.total()
    decoded = _decoded(pictures, trial)
    factor = decoded.value / max(headers, 1)
    costs = _costs(looked, trial, seen, layout)
    return Evidence(
        shards=num_shards,
        read_bytes=total_bytes,
        pictures=decoded,
        rejects=_rejects(header_rejects, pictures.value, headers, trial, num_shards > len(sizes)),
        tile_counts={n: counts[n] * factor for n in sorted(counts)},
        ways=totals,
        costs=costs,
        sample=SampleNote(
            shards=len(looked.shards),
            of_shards=num_shards,
            bytes=seen,
            of_bytes=total_bytes,
            pictures=headers,
            decoded_pictures=trial.pictures,
            seed=config.seed,
            missing=found.missing,
            broken={count.name: count.failure for count in looked.shards if count.failure},
        ),
        rates=_rates(looked, trial, costs, seen),
        kept=looked.kept,
    )


def _rejects(
    by_headers: Estimate, pictures: float, headers: int, trial: Trial, sampled: bool
) -> Estimate:
    """Rejects that headers and members show, and those that decoding brings: of the latter a few
    pictures alone were tried."""
    undecoded = trial.rejects.total()
    if not undecoded:
        if by_headers.value == 0 and sampled:
            return none_seen(headers, pictures)
        return by_headers
    share = undecoded / trial.pictures
    margin = Z * sqrt(share * (1 - share) / trial.pictures) * pictures
    value = by_headers.value + share * pictures
    if by_headers.low is None or by_headers.high is None:
        return Estimate(value, None, None)
    return Estimate(
        value,
        max(float(undecoded), by_headers.low + share * pictures - margin),
        by_headers.high + share * pictures + margin,
    )


def _decoded(by_headers: Estimate, trial: Trial) -> Estimate:
    """What is left of what headers promise: pictures that cannot be decoded give nothing. Their
    share is that of the few pictures that were tried, and as uncertain."""
    share = trial.rejects.total() / trial.pictures
    margin = Z * sqrt(share * (1 - share) / trial.pictures) * by_headers.value
    left = by_headers.scaled(1 - share)
    if not share or left.low is None or left.high is None:
        return left
    assert by_headers.high is not None
    high = min(left.high + margin, by_headers.high)
    return Estimate(left.value, max(0.0, left.low - margin), high)


def _costs(looked: Survey, trial: Trial, seen: int, layout: Layout) -> Costs:
    tiles = max(trial.tiles, 1)
    return Costs(
        read_cpu_per_byte=looked.read_cpu_seconds / seen,
        tile_cpu_per_tile=trial.tile_cpu_seconds / tiles,
        write_cpu_per_tile=trial.write_cpu_seconds / tiles,
        stream_bytes_per_second=min(FASTEST_STREAM, seen / max(looked.read_seconds, 1e-9)),
        output_bytes_per_tile=trial.output_bytes / tiles,
        commit_bytes=trial.commit_bytes,
        objects_a_part=len(part_paths("s", 1, 1, layout)[0]),
    )


def _rates(looked: Survey, trial: Trial, costs: Costs, seen: int) -> list[Rate]:
    here = f"{trial.pictures} pictures of the sample, CPU seconds of one core here"
    return [
        Rate(
            name="tiling",
            value=1 / max(costs.tile_cpu_per_tile, 1e-12),
            unit="tiles/s a core",
            basis="measured",
            source=here,
        ),
        Rate(
            name="tiling",
            value=trial.pictures / max(trial.tile_cpu_seconds, 1e-12),
            unit="pictures/s a core",
            basis="measured",
            source=here,
        ),
        Rate(
            name="writing",
            value=1 / max(costs.write_cpu_per_tile, 1e-12),
            unit="tiles/s a core",
            basis="measured",
            source="part files and the output, to this machine's disk",
        ),
        Rate(
            name="reading",
            value=costs.stream_bytes_per_second / 1e6,
            unit="MB/s a reader",
            basis="measured",
            source=f"{seen / 1e6:,.0f} MB of the sample, from here",
        ),
    ]
