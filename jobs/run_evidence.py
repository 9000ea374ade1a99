"""What a plan rests on when a run has been: its commits tell what was counted and how long it took.

Shards of the run are the clusters of the estimate. Seconds are those that its tasks took, on the
machines that it ran on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.capacity import Costs
from jobs.cpu_rate import CpuRates
from jobs.device_rates import with_measured
from jobs.device_tables import DeviceTable, Measured
from jobs.evidence import Evidence, Way, WayTotals, chunk_sizes, list_input
from jobs.outcome import CpuRun
from jobs.plan_document import Rate, SampleNote
from jobs.plan_options import PlanConfig
from jobs.sampling import Estimate, choose, estimate_total
from model.errors import UserError
from pipeline.commits import Commit, Dataset, committed_shards, read_commits, read_dataset
from pipeline.cpus import usable_cpus
from pipeline.generations import part_paths
from pipeline.layout import Layout, layout_of
from pipeline.storage import Storage, explained, redact
from pipeline.versions import current

MOST_COMMITS = 2000
LOAD_SECONDS = 4.0  # of a replica with a small model on a CPU: imports, mostly
# Options that OUTPUT's settings decide; another value would be the plan of another run.
DECIDED = (
    "tiling", "max_tiles", "thumbnail", "max_upscale", "resize", "format", "embedding_dtype",
    "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """An earlier run: what made it, and some of its commits."""

    output: str
    dataset: Dataset
    committed: int
    commits: tuple[Commit, ...]


def read_run(output: str, seed: int, storage: Storage) -> Run:
    """The version of OUTPUT that readers take.

    Raises:
        UserError: OUTPUT is none, or no tile was computed for what is committed there.
    """
    folder = current(output, storage)
    dataset = read_dataset(folder, storage)
    with explained("read", folder):
        names = sorted(committed_shards(folder, storage))
        chosen = [names[at] for at in choose(len(names), MOST_COMMITS, seed)]
        commits = tuple(read_commits(folder, chosen, storage))
    if not _computed_tiles(commits):
        raise UserError(
            f"{redact(folder)}: no tile was computed there; give --from a run with some"
        )
    return Run(folder, dataset, len(names), commits)


def settings_of(config: PlanConfig, run: Run, given: frozenset[str]) -> PlanConfig:
    """The options with what OUTPUT's settings say.

    Raises:
        UserError: one of them was given, and is another.
    """
    settings = run.dataset.settings
    found: dict[str, Any] = {name: settings[name] for name in DECIDED if name in settings}
    found |= {
        "features": tuple(run.dataset.features),
        "carry": tuple(settings["carry"]),
        "image_key": tuple(settings["image_key"]),
    }
    for name in sorted(given & found.keys()):
        if getattr(config, name) != found[name]:
            raise UserError(
                f"plan --from {redact(run.output)}: {name} is {found[name]} there, "
                f"{getattr(config, name)} asked; leave it out, or plan without --from"
            )
    update = {**found, "model": config.model or run.dataset.model}
    return config.model_copy(update=update)


def evidence_of(config: PlanConfig, run: Run, storage: Storage) -> Evidence:
    """Totals over INPUT, or over OUTPUT's own shards where none is given."""
    commits = run.commits
    sizes = [commit.source.size for commit in commits]
    apart = False
    if config.input:
        found = list_input(config, storage)
        num_shards, total_bytes, missing = len(found.shards), found.total_bytes, found.missing
        apart = {shard.name for shard, _ in found.shards} != {commit.shard for commit in commits}
    else:
        num_shards, missing = run.committed, 0
        total_bytes = round(sum(sizes) * num_shards / len(commits))

    def total(counted: Sequence[float]) -> Estimate:
        return estimate_total(counted, sizes, num_shards, total_bytes, apart)

    tiles = total([commit.tiles for commit in commits])
    samples = total([commit.samples - commit.rejects for commit in commits])
    rejects = total([commit.rejects for commit in commits])
    way = Way(config.tiling, config.max_tiles, config.max_upscale)
    tiles_a_shard = tiles.value / num_shards
    layout = layout_of(run.dataset)
    chunks = {
        most: num_shards * max(1.0, tiles_a_shard / number)
        for most, number in chunk_sizes(layout).items()
    }
    costs = _costs(commits, layout)
    return Evidence(
        shards=num_shards,
        read_bytes=total_bytes,
        pictures=samples,
        rejects=rejects,
        tile_counts=_tile_counts(commits, samples.value),
        ways={way: WayTotals(tiles, chunks)},
        costs=costs,
        sample=SampleNote(
            shards=len(commits),
            of_shards=num_shards,
            bytes=sum(sizes),
            of_bytes=total_bytes,
            pictures=sum(commit.samples - commit.rejects for commit in commits),
            decoded_pictures=0,
            seed=config.seed,
            missing=missing,
            broken={},
        ),
        rates=_rates(costs, run),
        notes=["other ways of tiling are not compared: the commits of a run know of one alone"],
    )


def devices_of(run: Run, table: DeviceTable, tflop_per_tile: float) -> DeviceTable:
    """The table with the rates of the GPUs that computed the run."""
    for device, done in _computed(run.commits).items():
        entry = None if device == "cpu" else table.called(device)
        if entry is None or not done.seconds:
            continue
        measured = Measured(
            tiles_per_second=done.tiles / done.seconds / done.ranks,
            ranks=done.ranks,
            tflop_per_tile=tflop_per_tile,
            source=f"{redact(run.output)}: {done.tiles:,} tiles on {device}",
            basis="run",
        )
        table = with_measured(table, entry, measured)
    return table


def cpu_of(run: Run, replicas: int) -> CpuRun | None:
    """How fast this kind of machine was, where the run was on CPUs. Its tasks took the seconds
    beside each other, so nothing is left to be shared."""
    found = _computed(run.commits).get("cpu")
    if found is None or not found.seconds:
        return None
    tile_seconds = sum(commit.seconds.tile for commit in run.commits)
    embedding = replicas * found.tiles / found.seconds
    tiling = usable_cpus() * _computed_tiles(run.commits) / max(tile_seconds, 1e-9)
    rates = CpuRates(
        encode_alone=embedding,
        encode_beside=embedding,
        tile_alone=tiling,
        tile_beside=tiling,
        load_seconds=LOAD_SECONDS,
        detail="of a run",
    )
    source = f"{redact(run.output)}: {found.tiles:,} tiles, seconds of its replicas"
    return CpuRun(rates, usable_cpus(), replicas, "run", source)


@dataclass(frozen=True)
class Done:
    """What replicas of one kind computed, and the seconds they took."""

    tiles: int
    seconds: float
    ranks: int


def _computed(commits: Sequence[Commit]) -> dict[str, Done]:
    """By device, with the number of ranks that computed most; of shards that one kind alone
    computed. Tiles that were taken over cost a replica nothing."""
    tiles: Counter[tuple[str, int]] = Counter()
    seconds: defaultdict[tuple[str, int], float] = defaultdict(float)
    for commit in commits:
        kinds = {(how.device, how.tensor_parallel) for how in commit.computed}
        if len(kinds) == 1 and commit.tiles > commit.reused:
            (kind,) = kinds
            tiles[kind] += commit.tiles - commit.reused
            seconds[kind] += commit.seconds.embed
    found: dict[str, Done] = {}
    for (device, ranks), count in tiles.most_common():
        found.setdefault(device, Done(count, seconds[device, ranks], ranks))
    return found


def _computed_tiles(commits: Sequence[Commit]) -> int:
    return sum(commit.tiles - commit.reused for commit in commits)


def _tile_counts(commits: Sequence[Commit], pictures: float) -> dict[int, float]:
    """So many pictures by tile count, where the commits tell it."""
    counts: Counter[int] = Counter()
    for commit in commits:
        counts.update(commit.tile_counts)
    return {n: counts[n] * pictures / counts.total() for n in sorted(counts)}


def _costs(commits: Sequence[Commit], layout: Layout) -> Costs:
    tiles = sum(commit.tiles for commit in commits)
    seen = sum(commit.source.size for commit in commits)
    read = sum(commit.seconds.read for commit in commits)
    written = sum(part.total_bytes for commit in commits for part in commit.parts)
    return Costs(
        read_cpu_per_byte=read / seen,
        tile_cpu_per_tile=sum(c.seconds.tile for c in commits) / _computed_tiles(commits),
        write_cpu_per_tile=sum(commit.seconds.write for commit in commits) / tiles,
        stream_bytes_per_second=seen / max(read, 1e-9),
        output_bytes_per_tile=written / tiles,
        commit_bytes=sum(len(commit.dump()) for commit in commits) / len(commits),
        objects_a_part=len(part_paths("s", 1, 1, layout)[0]),
    )


def _rates(costs: Costs, run: Run) -> list[Rate]:
    source = f"{len(run.commits)} commits of {redact(run.output)}, seconds of its tasks"
    return [
        Rate(
            name=name,
            value=value,
            unit=unit,
            basis="run",
            source=source,
        )
        for name, value, unit in (
            ("tiling", 1 / max(costs.tile_cpu_per_tile, 1e-12), "tiles/s a task"),
            ("writing", 1 / max(costs.write_cpu_per_tile, 1e-12), "tiles/s a task"),
            ("reading", costs.stream_bytes_per_second / 1e6, "MB/s a reader"),
        )
    ]
