"""Is a whole job as fast as the script one would write instead?

python -m benchmarks.end_to_end [--shards N] [--pictures N] [--rounds N] [--replicas N]
    [--results FOLDER]

`tessera extract` and `baseline_script.py` do the same work in turns: same tars, same model,
float32, dynamic tiling, same embeddings (checked). Whole processes, from the command to its end.
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

import numpy as np
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from benchmarks.dataset import SMALL_MODEL, laion_like, write_shards, write_small_model
from benchmarks.record import REPOSITORY, RESULTS, Table, machine, write_result

MAX_RELATIVE_ERROR = 1e-4
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """Wall time of one process, and when the first file of the watched folder was there."""

    seconds: float
    first_commit_seconds: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole jobs: tessera against a plain script.")
    parser.add_argument("--shards", type=int, default=16, help="[default: 16]")
    parser.add_argument("--pictures", type=int, default=75, help="in each shard [default: 75]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each [default: 3]")
    parser.add_argument(
        "--replicas", type=int, default=1, help="tessera's [default: 1, as the job has it]"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        tars = write_shards(folder / "shards", options.shards, options.pictures, laion_like())
        model = write_small_model(folder / "model")
        ours: list[Run] = []
        theirs: list[Run] = []
        for turn in range(options.rounds):
            output, plain = folder / f"output-{turn}", folder / f"plain-{turn}.parquet"
            command = tessera(tars, output, model, options.replicas)
            ours.append(run(command, output / "commits"))
            theirs.append(run(script(tars, plain, model)))
            tiles, error = compare(output / "embeddings", plain)
            print(
                f"round {turn + 1}: tessera {ours[-1].seconds:.1f} s, "
                f"script {theirs[-1].seconds:.1f} s, {tiles} tiles",
                file=sys.stderr,
            )
        stages = stage_seconds(output / "commits")
    wall = Table(
        f"{options.shards} shards of {options.pictures} pictures, {tiles} tiles",
        ("", "seconds, min", "median", "max", "tiles/s (median)"),
        (
            _row("tessera extract", [r.seconds for r in ours], tiles),
            _row("plain script", [r.seconds for r in theirs], tiles),
            _row("to the first committed shard", [r.first_commit_seconds or 0.0 for r in ours]),
        ),
    )
    ratios = [
        script.seconds / tessera.seconds for tessera, script in zip(ours, theirs, strict=True)
    ]
    pairs = Table(
        "Seconds of the script / seconds of tessera, pair by pair (above 1: tessera is faster)",
        ("min", "median", "max"),
        ((f"{min(ratios):.3f}", f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}"),),
    )
    spent = Table(
        "Where tessera's last run spent its time: seconds inside tasks, summed",
        tuple(stages),
        (tuple(round(seconds, 1) for seconds in stages.values()),),
    )
    notes = [
        f"model: {SMALL_MODEL.num_layers} blocks, hidden {SMALL_MODEL.hidden_size}, "
        f"{SMALL_MODEL.num_heads} heads, {SMALL_MODEL.num_tokens} tokens, float32",
        "dynamic tiling, 12 tiles and thumbnail; cls in float32; runs in turns, A B A B",
        f"tessera: --replicas {options.replicas}, which share the cores' threads",
        "script: webdataset, DataLoader with 2 workers, transformers' InternVLVisionModel on 2 "
        "threads, Parquet; it has no commits: its output is whole at its end or lost",
        f"largest relative difference of an embedding between the two: {error:.1e}",
    ]
    print(write_result("end-to-end", "cpu", about, [wall, pairs, spent], notes, options.results))


def tessera(tars: Path, output: Path, model: Path, replicas: int) -> list[str]:
    options = (
        "--tiling dynamic --features cls --carry txt --dtype float32 --embedding-dtype float32"
    )
    command = [sys.executable, "-m", "jobs.cli", "extract", str(tars), str(output)]
    return [*command, "--model", str(model), "--replicas", str(replicas), *options.split()]


def script(tars: Path, output: Path, model: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.baseline_script", str(tars), str(output), str(model)]


def run(command: Sequence[str], watched: Path | None = None) -> Run:
    """Runs a command to its end. Raises CalledProcessError, its output shown, where it fails."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1"}
    first = None
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        while first is None and watched is not None and process.poll() is None:
            if watched.is_dir() and any(path.suffix == ".json" for path in watched.iterdir()):
                first = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        status = process.wait()
        seconds = time.perf_counter() - began
        if status:
            log.seek(0)
            sys.stderr.write(log.read())
            raise subprocess.CalledProcessError(status, command)
    return Run(seconds, first)


def compare(embeddings: Path, plain: Path) -> tuple[int, float]:
    """Number of tiles, and the largest relative difference of a tile's embedding.

    Raises ValueError where the two hold other tiles, or differ by more than MAX_RELATIVE_ERROR.
    """
    columns = ["key", "tile_index", "txt", "cls"]
    order = [("key", "ascending"), ("tile_index", "ascending")]
    ours = pds.dataset(embeddings).to_table(columns=columns).sort_by(order)
    theirs = pq.read_table(plain, columns=columns).sort_by(order)
    if not ours.num_rows or not ours.drop(["cls"]).equals(theirs.drop(["cls"])):
        raise ValueError(
            f"other rows: {ours.num_rows} in {embeddings}, {theirs.num_rows} in {plain}"
        )
    a, b = (
        np.stack(table["cls"].to_numpy()).astype(np.float64) for table in (ours, theirs)
    )  # [tiles, hidden]
    error = float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
    if not error <= MAX_RELATIVE_ERROR:
        raise ValueError(f"embeddings differ by {error:.1e}, more than {MAX_RELATIVE_ERROR:.0e}")
    return ours.num_rows, error


def stage_seconds(commits: Path) -> dict[str, float]:
    total: Counter[str] = Counter()
    for file in commits.glob("**/*.json"):
        total.update(json.loads(file.read_text())["seconds"])
    return dict(total)


def _row(name: str, seconds: list[float], tiles: int = 0) -> tuple[str | float | None, ...]:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    rate = round(tiles / middle, 1) if tiles else None
    return (name, round(low, 1), round(middle, 1), round(high, 1), rate)


if __name__ == "__main__":
    main()
