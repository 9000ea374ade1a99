"""Does `tessera plan` say what comes?

python -m benchmarks.plan [--shards N] [--pictures N] [--sample N] [--run N] [--rounds N]
    [--keep FOLDER] [--results FOLDER]

Shards of pictures drawn at random from a pool, so that every tile is known. `plan` reads a sample
of them; its tiles are compared with the truth, and so are those of the samples that other seeds
would have drawn. Then `plan` and `extract` in turns over some of the shards, on this machine's
cores with the small model: the wall time that was told and the one that came, from the command to
its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dataset import SMALL_MODEL, laion_like, write_shard, write_small_model
from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result
from jobs.sampling import choose, estimate_total
from pipeline.tiling import Tiling, picture_size, plan_tiles

POOL = 240  # distinct pictures
SIDE = 448
SEEDS = 200
OPTIONS = ("--tiling", "dynamic", "--features", "cls", "--carry", "txt", "--dtype", "float32")
TILES_WITHIN, SECONDS_WITHIN = 0.02, 0.15


@dataclass(frozen=True)
class Truth:
    """What was made: sizes and tiles of each shard, pictures by tile count."""

    sizes: list[int]
    tiles: list[int]
    counts: Counter[int]

    @property
    def total(self) -> int:
        return sum(self.tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a plan says, and what comes.")
    parser.add_argument("--shards", type=int, default=200, help="[default: 200]")
    parser.add_argument("--pictures", type=int, default=200, help="of a shard [default: 200]")
    parser.add_argument("--sample", type=int, default=20, help="shards that are read [default: 20]")
    parser.add_argument("--run", type=int, default=6, help="shards that are run [default: 6]")
    parser.add_argument(
        "--rounds", type=int, default=2, help="plans and runs; 0: tiles alone [default: 2]"
    )
    parser.add_argument("--keep", type=Path, help="shards stay here, and are used again")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        shards = options.keep or folder / "shards"
        truth = write_dataset(shards, options.shards, options.pictures)
        model = write_small_model(folder / "model")
        print(f"{truth.total} tiles in {options.shards} shards", file=sys.stderr)
        sampled = plan(shards, "--sample-shards", str(options.sample), "--seed", "0")
        runs = [
            one_round(shards, model, folder / f"output-{number}", truth.tiles[: options.run])
            for number in range(options.rounds)
        ]
    tables = [
        tiles_table(sampled, truth),
        histogram_table(sampled, truth),
        seeds_table(truth, options.sample),
        *([wall_table(runs), rates_table(runs)] if runs else []),
    ]
    notes = [
        f"{POOL} distinct JPEGs of LAION's shapes, drawn at random; {options.pictures} pictures "
        f"a shard, {sum(truth.sizes) / 1e6:,.0f} MB",
        f"run: {options.run} shards, all of them read by `plan`; small model of "
        f"{SMALL_MODEL.num_layers} blocks, hidden {SMALL_MODEL.hidden_size}, float32; one replica",
        "seconds: of the whole process, from the command to its end",
        f"aims: tiles within {TILES_WITHIN:.0%}, seconds within {SECONDS_WITHIN:.0%}",
        *verdicts(sampled, truth, runs),
    ]
    print(write_result("plan", "cpu", about, tables, notes, options.results))


def write_dataset(folder: Path, num_shards: int, num_pictures: int) -> Truth:
    """Shards whose every picture is drawn from a pool; the same each time, and written once."""
    pool = laion_like(POOL, seed=1)
    tiling = Tiling("dynamic", SIDE, SIDE)
    tiles_of = [plan_tiles(*picture_size(data), tiling).tile_count for data in pool]
    rng = np.random.default_rng(2)
    truth = Truth([], [], Counter())
    for shard in range(num_shards):
        drawn = [int(at) for at in rng.integers(len(pool), size=num_pictures)]
        path = folder / f"{shard:05d}.tar"
        if not path.exists():
            write_shard(path, [pool[at] for at in drawn], num_pictures, shard * num_pictures)
        truth.sizes.append(path.stat().st_size)
        truth.tiles.append(sum(tiles_of[at] for at in drawn))
        truth.counts.update(tiles_of[at] for at in drawn)
    return truth


def plan(source: Path | str, *arguments: str) -> dict[str, Any]:
    """The document of `tessera plan`."""
    command = [sys.executable, "-m", "jobs.cli", "plan", str(source), *OPTIONS[:-2], *arguments]
    done = subprocess.run(
        [*command, "--json"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@dataclass(frozen=True)
class Round:
    """What was told and what came; `load`: average load of the machine before each."""

    plan: dict[str, Any]
    seconds: float
    inner_seconds: float
    tiles: int
    loads: tuple[float, float]

    @property
    def told(self) -> float:
        return float(self.plan["chosen"]["wall_seconds"])

    @property
    def error(self) -> float:
        return self.told / self.seconds - 1


def one_round(shards: Path, model: Path, output: Path, tiles_of: Sequence[int]) -> Round:
    """Plans a run over the first shards, then runs it."""
    source = f"{shards}/{{00000..{len(tiles_of) - 1:05d}}}.tar"
    tiles = sum(tiles_of)
    before = os.getloadavg()[0]
    told = plan(source, "--model", str(model), "--fleet", "cpu", "--dtype", "float32")
    between = os.getloadavg()[0]
    command = [sys.executable, "-m", "jobs.cli", "extract", source, str(output)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--model", str(model), *OPTIONS, "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    summary = json.loads(done.stdout)
    if summary["tiles"] != tiles:
        raise ValueError(f"{summary['tiles']} tiles came, {tiles} were made")
    found = Round(told, seconds, summary["seconds"], tiles, (before, between))
    print(f"told {found.told:.1f} s, came {seconds:.1f} s: {found.error:+.1%}", file=sys.stderr)
    return found


def tiles_table(sampled: dict[str, Any], truth: Truth) -> Table:
    sample = sampled["sample"]
    rows: list[tuple[Cell, ...]] = []
    for name, real in (("tiles", truth.total), ("pictures", truth.counts.total())):
        told = sampled[name]
        rows.append(
            (
                name,
                real,
                round(told["value"]),
                f"{told['value'] / real - 1:+.2%}",
                f"{told['low']:.0f}-{told['high']:.0f}",
            )
        )
    return Table(
        f"{sample['shards']} of {sample['of_shards']} shards read, {sample['pictures']} headers",
        ("", "truth", "plan", "error", "95 % interval"),
        tuple(rows),
    )


def histogram_table(sampled: dict[str, Any], truth: Truth) -> Table:
    told = sampled["chosen"]["tile_counts"]
    rows = tuple((n, truth.counts[n], round(told.get(str(n), 0.0))) for n in sorted(truth.counts))
    return Table("Pictures by their tiles", ("tiles", "truth", "plan"), rows)


def seeds_table(truth: Truth, wanted: int) -> Table:
    """What other seeds would have told of the tiles: arithmetic on the known shards."""
    rows: list[tuple[Cell, ...]] = []
    num_shards, total_bytes = len(truth.sizes), sum(truth.sizes)
    for looked_at in sorted({wanted // 2, wanted, 2 * wanted}):
        errors, held = [], 0
        for seed in range(SEEDS):
            at = choose(num_shards, looked_at, seed)
            found = estimate_total(
                [truth.tiles[i] for i in at], [truth.sizes[i] for i in at], num_shards, total_bytes
            )
            errors.append(abs(found.value / truth.total - 1))
            held += (found.low or 0) <= truth.total <= (found.high or 0)
        within = sum(error <= TILES_WITHIN for error in errors) / SEEDS
        rows.append(
            (
                looked_at,
                f"{statistics.median(errors):.2%}",
                f"{max(errors):.2%}",
                f"{within:.0%}",
                f"{held / SEEDS:.0%}",
            )
        )
    columns = ("shards read", "median error", "largest", "within 2 %", "interval holds the truth")
    return Table(f"Error of the tiles, {SEEDS} seeds", columns, tuple(rows))


def wall_table(runs: Sequence[Round]) -> Table:
    rows = tuple(
        (
            number,
            run.tiles,
            round(run.told, 1),
            round(run.seconds, 1),
            f"{run.error:+.1%}",
            round(run.tiles / run.seconds, 1),
            round(run.seconds - run.inner_seconds, 1),
            f"{run.loads[0]:.1f}, {run.loads[1]:.1f}",
        )
        for number, run in enumerate(runs, 1)
    )
    columns = (
        "round", "tiles", "seconds, plan", "seconds, extract", "error", "tiles/s",
        "of them before and after the run", "load before plan, before extract",
    )  # fmt: skip
    return Table("Wall time of a run on the cores", columns, rows)


def rates_table(runs: Sequence[Round]) -> Table:
    names = [f"{rate['name']}, {rate['unit']}" for rate in runs[0].plan["rates"]]
    rows = tuple(
        (name, *[float(f"{run.plan['rates'][at]['value']:.4g}") for run in runs])
        for at, name in enumerate(names)
    )
    return Table(
        "What the plans rested on", ("", *[f"round {n + 1}" for n in range(len(runs))]), rows
    )


def verdicts(sampled: dict[str, Any], truth: Truth, runs: Sequence[Round]) -> list[str]:
    error = sampled["tiles"]["value"] / truth.total - 1
    found = [f"{'met' if abs(error) <= TILES_WITHIN else 'MISSED'}: tiles {error:+.2%}"]
    if not runs:
        return [*found, "not measured: seconds"]
    worst = max((run.error for run in runs), key=abs)
    verdict = "met" if abs(worst) <= SECONDS_WITHIN else "MISSED"
    return [*found, f"{verdict}: seconds, the worst of {len(runs)} {worst:+.1%}"]


if __name__ == "__main__":
    main()
