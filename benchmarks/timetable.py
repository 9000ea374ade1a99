"""A schedule in real time: fires every minute on a real head while INPUT changes.

python -m benchmarks.timetable [--results FOLDER]        (five minutes; Debian's prometheus)

After the first run a shard is added, one is changed by one picture, and one removed: the next run
computes what changed, and those after it nothing. What was computed is read twice, from the
schedule's history and from Prometheus.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result
from pipeline import metrics
from tests.builders import samples, write_checkpoint, write_tar
from tests.prometheus import Prometheus, prometheus
from tests.ray_head import Head, ray_head

PICTURES = 20
MEMBERS = 3  # of each sample
COMMAND = (sys.executable, "-m", "jobs.cli")
PATIENCE_SECONDS = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description="A schedule in real time.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        with (
            ray_head(num_cpus=6) as head,
            prometheus(head.folder / "session_latest") as server,
            scheduled(folder, head) as history,
        ):
            server.wait_until(lambda: len(ended(history)) >= 1, "a first run", PATIENCE_SECONDS)
            change(folder / "in")
            before = len(ended(history))
            server.wait_until(lambda: any_work(history, before), "what changed", PATIENCE_SECONDS)
            after = len(ended(history)) + 1
            server.wait_until(lambda: len(ended(history)) >= after, "nothing", PATIENCE_SECONDS)
            runs = ended(history)
            rows = [row(run) for run in runs]
            counted = counters(server, runs)
    columns = ("ended", "exit", "new", "changed", "vanished", "tiles", "taken over", "pruned")
    tables = [
        Table("Runs of the schedule", columns, tuple(rows)),
        Table("Prometheus, at the end", ("metric", "value", "by the history"), tuple(counted)),
    ]
    notes = ["the shard that changed lost one picture for another; `--prune` removed one"]
    print(write_result("timetable", "cpu", about, tables, notes, options.results))


@contextmanager
def scheduled(folder: Path, head: Head) -> Iterator[Path]:
    """INPUT of four shards, and a schedule that brings OUTPUT up to date every minute."""
    for number in range(4):
        write_tar(shard(folder / "in", number), pictures(number))
    model, history = write_checkpoint(folder / "model"), folder / "runs.jsonl"
    arguments = [str(folder / "in"), str(folder / "out"), "--model", str(model)]
    command = [
        *(*COMMAND, "schedule", "--cron", "* * * * *", "--history", str(history), "--address"),
        *(head.url, "--", *arguments, "--dtype", "float32", "--prune"),
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **head.env})
    try:
        yield history
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


def pictures(seed: int) -> list[tuple[str, bytes]]:
    return samples(PICTURES, seed=seed, prefix=f"{seed:05d}-")


def shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def change(folder: Path) -> None:
    write_tar(shard(folder, 4), pictures(4))
    members = pictures(1)
    members[:MEMBERS] = [
        (name, data)
        for (name, _), (_, data) in zip(members[:MEMBERS], pictures(9)[:MEMBERS], strict=True)
    ]
    write_tar(shard(folder, 1), members)
    shard(folder, 2).unlink()


def ended(history: Path) -> list[dict[str, Any]]:
    if not history.exists():
        return []
    events = [json.loads(line) for line in history.read_text().splitlines()]
    return [event for event in events if event["event"] == "end"]


def any_work(history: Path, after: int) -> bool:
    return any(run["changed"]["committed"] for run in ended(history)[after:])


def row(run: dict[str, Any]) -> tuple[Cell, ...]:
    did = run["changed"]
    classes = did["plan"]["classes"]
    return (
        *(run["at"], run["exit"]),
        *(classes[name]["shards"] for name in ("new", "changed", "vanished")),
        *(did["tiles"], did.get("reused_tiles", 0), ", ".join(did.get("pruned", []))),
    )


def counters(server: Prometheus, runs: list[dict[str, Any]]) -> list[tuple[Cell, ...]]:
    """What Prometheus has, once it has scraped the last run, beside the sums of the history."""
    did = [run["changed"] for run in runs]
    expected = {
        metrics.TILES: sum(one["tiles"] for one in did),
        metrics.REUSED: sum(one.get("reused_tiles", 0) for one in did),
        metrics.SHARDS: sum(one["committed"] for one in did),
    }

    def value(metric: metrics.Metric) -> float:
        found = server.query(f"last_over_time({metric.exported}[1h])")
        return sum(series.value for series in found)

    server.wait_until(
        lambda: all(value(metric) == wanted for metric, wanted in expected.items()),
        f"as the history has it: {expected.values()}",
    )
    return [(metric.exported, value(metric), wanted) for metric, wanted in expected.items()]


if __name__ == "__main__":
    main()
