"""What does an index of a million vectors cost, and what does it find?

python -m benchmarks.vector_index [--shards 100] [--pictures 10000] [--width 3200] [--kind ivf-pq]

Makes an OUTPUT of random clustered vectors (`benchmarks.clustered`; 6.4 GB as it stands), indexes
it with the command itself, asks the index, and brings it up to date twice: after one more shard,
and after one less. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clustered import FEATURE, Clusters, put_all, put_one
from benchmarks.memory import MIB, Sample, watch
from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from pipeline.commits import read_commit
from pipeline.index_record import KINDS
from pipeline.read import vectors
from pipeline.storage import Storage
from pipeline.unit_vectors import Nearest, normalized
from pipeline.vector_index import VectorIndex
from tests.vector_outputs import drop_shard

QUERIES = 200
QUERY_SEED = 1_000_000  # of no shard
NEIGHBORS = 10
STORAGE = Storage()


@dataclass(frozen=True)
class Run:
    """One run of the command: what it printed, and what it took."""

    document: dict[str, Any]
    seconds: float
    samples: list[Sample]

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all processes, but for what each did after it was last looked at."""
        last: dict[int, float] = {}
        for sample in self.samples:
            last.update(sample.cpu_seconds)
        return sum(last.values())

    def row(self, what: str) -> tuple[Cell, ...]:
        peak = max(self.samples, key=lambda sample: sample.total)
        own = max(sample.total - sample.files for sample in self.samples)
        recall = self.document["recall"]["value"]
        return (
            what,
            round(self.seconds, 1),
            round(self.cpu_seconds, 1),
            round(peak.total / MIB),
            round(own / MIB),
            recall,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="An index of many vectors, built and kept fresh.")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=10_000, help="of a shard")
    parser.add_argument("--width", type=int, default=3200)
    parser.add_argument("--kind", choices=KINDS, help="[default: by the number of vectors]")
    parser.add_argument("--folder", type=Path, help="for the data [default: a temporary one]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tessera-index-", dir=options.folder) as name:
        tables, notes = measure(Path(name), options)
    print(write_result("vector-index", "cpu", about, tables, notes, options.results))


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[str]]:
    output, index = str(folder / "out"), str(folder / "index")
    clusters = Clusters(options.shards * options.pictures, options.width)
    began = time.perf_counter()
    put_all(output, clusters, options.shards, options.pictures)
    made_seconds = time.perf_counter() - began
    say(f"made in {made_seconds:.0f} s")
    built = run(output, index, options.kind)
    rows = [built.row("build")]
    say(rows[-1])
    asked = ask(output, index, clusters.draw(QUERIES, QUERY_SEED))
    for row in asked:
        say(row)
    put_one(output, clusters, options.shards, options.pictures)
    added = run(output, index)
    rows.append(added.row("one shard more"))
    say(rows[-1])
    lost = f"{options.shards // 2:05d}"
    gone = np.concatenate([r.values for r in vectors(output, FEATURE, shards=[lost])])[::10]
    commit = read_commit(output, lost, STORAGE)
    assert commit is not None
    drop_shard(output, commit, STORAGE)
    removed = run(output, index)
    rows.append(removed.row("one shard less"))
    say(rows[-1])
    opened = VectorIndex.open(index, STORAGE)
    returned = sum(n.shard == lost for found in opened.search(gone, NEIGHBORS) for n in found)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.cli", "verify", index], check=True)
    verified = time.perf_counter() - began
    columns = (
        "",
        "seconds",
        "processor seconds",
        "peak memory, MiB",
        "the same without mapped files",
        "recall@10",
    )
    tables = [
        Table("tessera index", columns, tuple(rows)),
        Table("The index, asked", ("", "figure"), tuple(asked)),
    ]
    size = sum(p.stat().st_size for p in Path(index).rglob("*") if p.is_file())
    notes = [
        f"{clusters.vectors:,} vectors of {clusters.width} in {options.shards} shards, made in "
        f"{made_seconds:.0f} s as benchmarks/clustered.py says: clusters of about 1000 in a common "
        "subspace of 512 dimensions, standard deviations decaying as 1/sqrt(i), 2 % noise",
        f"parameters: {json.dumps(built.document['parameters'])}; "
        f"{built.document['segments']} segments; INDEX has {size / 1e9:.2f} GB",
        f"told before the build: {json.dumps(built.document['estimate'])}",
        f"seconds and memory are of the whole command, start of Python (and Ray, where there are "
        f"several segments to build) included; adding one shard of {options.pictures} took "
        f"{added.seconds / built.seconds:.2%} of the build's time, and "
        f"{added.cpu_seconds / built.cpu_seconds:.2%} of its processor time",
        f"of a removed shard {returned} vectors were among {NEIGHBORS * len(gone)} neighbours of "
        f"{len(gone)} of its own vectors",
        f"verify of the index: {verified:.1f} s",
        "memory: sums of proportional set sizes over the process tree",
    ]
    return tables, notes


def run(output: str, index: str, kind: str | None = None) -> Run:
    """The command, watched."""
    with tempfile.TemporaryDirectory() as name:
        result = Path(name, "result.json")
        command = f'exec "$0" -m jobs.cli index "$1" "$2" --json $3 > "{result}"'
        asked = f"--kind {kind}" if kind else ""
        began = time.perf_counter()
        samples = watch(["bash", "-c", command, sys.executable, output, index, asked])
        seconds = time.perf_counter() - began
        return Run(json.loads(result.read_text()), seconds, samples)


def ask(output: str, index: str, queries: np.ndarray[Any, Any]) -> list[tuple[Cell, ...]]:
    """Recall against exact search over OUTPUT, of queries that the index does not hold; speed."""
    began = time.perf_counter()
    opened = VectorIndex.open(index, STORAGE)
    open_seconds = time.perf_counter() - began
    began = time.perf_counter()
    found = opened.search(queries, NEIGHBORS)
    cold = len(queries) / (time.perf_counter() - began)
    began = time.perf_counter()
    opened.search(queries, NEIGHBORS)
    batch = len(queries) / (time.perf_counter() - began)
    began = time.perf_counter()
    for query in queries:
        opened.search(query[np.newaxis], NEIGHBORS)
    single = len(queries) / (time.perf_counter() - began)
    nearest = exact(output, normalized(queries))
    shares = [
        len(truth & {(n.shard, n.sample_index) for n in mine}) / NEIGHBORS
        for truth, mine in zip(nearest, found, strict=True)
    ]
    return [
        (
            f"recall@10 against exact search, {len(queries)} new queries",
            round(float(np.mean(shares)), 4),
        ),
        ("the lowest of one query", round(min(shares), 2)),
        ("seconds to open it", round(open_seconds, 2)),
        (f"queries a second, {len(queries)} at once, first time", round(cold, 1)),
        (f"queries a second, {len(queries)} at once", round(batch, 1)),
        ("queries a second, one by one", round(single, 1)),
    ]


def exact(output: str, queries: np.ndarray[Any, Any]) -> list[set[tuple[str, int]]]:
    """The nearest of all vectors of OUTPUT, which are read for it."""
    nearest = Nearest(queries, NEIGHBORS)
    shards: list[str] = []
    for run_of in vectors(output, FEATURE):
        if not shards or shards[-1] != run_of.shard:
            shards.append(run_of.shard)
        labels = run_of.pictures["sample_index"].to_numpy().astype(np.int64)
        nearest.add(normalized(run_of.values), labels + ((len(shards) - 1) << 32))
    return [
        {(shards[label >> 32], label & 0xFFFFFFFF) for label in row}
        for row in nearest.label.tolist()
    ]


def say(what: str | Sequence[Cell]) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
