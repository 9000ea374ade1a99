"""Does a job's memory grow with the number of shards, or with their size?

python -m benchmarks.memory [--results FOLDER]

Runs pairs of jobs, the second with ten times the input, and samples the memory of the whole process
tree: driver, Ray's own processes, workers, object store.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.dataset import SMALL_MODEL, laion_like, write_shards, write_small_model
from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result

SAMPLE_SECONDS = 0.2
MIB = 2**20
ALLOWED_GROWTH = 1.10
# Quick, so that 15 000 tiles take a minute or two.
MODEL = replace(SMALL_MODEL, hidden_size=20, num_layers=1, intermediate_size=20)
OPTIONS = "--dtype float32 --features cls --carry txt"


@dataclass(frozen=True)
class Sample:
    """Proportional set size of a process tree in bytes: shared pages count once in the sum.

    `shared` is the part of it that lies in shared memory: the object store; `files` the part that
    is mapped files. `cpu_seconds`: processor time so far, by process.
    """

    total: int
    shared: int
    files: int
    processes: Counter[str] = field(default_factory=Counter)
    by_role: Counter[str] = field(default_factory=Counter)
    cpu_seconds: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    shards: int
    pictures: int  # in each shard
    tiling: str
    resize: str


# Small shards: what may grow is the driver's books and the number of workers. Large: the tiles that
# wait for the replica; `fast` makes them faster than it takes them. The smaller case of each pair
# is large enough to fill the buffers, so that what is compared is the steady state.
CASES = (
    Case("20 small shards", 20, 80, "center-crop", "exact"),
    Case("200 small shards", 200, 80, "center-crop", "exact"),
    Case("one shard of 500 pictures", 1, 500, "dynamic", "fast"),
    Case("one shard of 5000 pictures", 1, 5000, "dynamic", "fast"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of whole jobs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--cases", default="0,1,2,3", help="numbers of cases [default: 0,1,2,3]")
    options = parser.parse_args()
    about = machine()
    pictures = laion_like()
    peaks: dict[str, int] = {}
    rows: list[tuple[Cell, ...]] = []
    roles: list[tuple[Cell, ...]] = []
    for case in [CASES[int(number)] for number in options.cases.split(",")]:
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
            folder = Path(name)
            tars = write_shards(folder / "shards", case.shards, case.pictures, pictures)
            model = write_small_model(folder / "model", MODEL)
            command = [sys.executable, "-m", "jobs.cli", "extract", str(tars), f"{folder}/output"]
            command += ["--model", str(model), "--tiling", case.tiling, "--resize", case.resize]
            command += OPTIONS.split()
            samples = watch(command)
        peak = max(samples, key=lambda sample: sample.total)
        peaks[case.name] = peak.total
        rows.append(
            (
                case.name,
                *(round(value / MIB) for value in (peak.total, max(s.shared for s in samples))),
                round(max(s.total - s.shared for s in samples) / MIB),
                max(s.processes.total() for s in samples),
                round(len(samples) * SAMPLE_SECONDS),
            )
        )
        roles.append((case.name, *(round(peak.by_role[role] / MIB) for role in ROLES)))
        print(rows[-1], roles[-1], file=sys.stderr)
    table = Table(
        "Peak memory of the whole job, MiB",
        ("", "all", "object store", "all but object store", "processes", "seconds"),
        tuple(rows),
    )
    parts = Table("At the peak of all, by kind of process, MiB", ("", *ROLES), tuple(roles))
    notes = [
        f"sum of proportional set sizes over the process tree, every {SAMPLE_SECONDS} s",
        *_verdicts(peaks),
    ]
    print(write_result("memory", "cpu", about, [table, parts], notes, options.results))


def watch(command: list[str]) -> list[Sample]:
    """Samples a command's process tree until it ends.

    Raises CalledProcessError, the command's output shown, where it fails.
    """
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    samples = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        status: int | None = None
        while status is None:
            samples.append(sample_tree(process.pid))
            try:
                status = process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        if status:
            log.seek(0)
            sys.stderr.write(log.read())
            raise subprocess.CalledProcessError(status, command)
    return samples


def sample_tree(pid: int) -> Sample:
    total = shared = files = 0
    cpu_seconds: dict[int, float] = {}
    processes: Counter[str] = Counter()
    by_role: Counter[str] = Counter()
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            role = "driver" if process.pid == pid else role_of(process.cmdline())
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            cpu_seconds[process.pid] = sum(process.cpu_times()[:2])
        except (psutil.Error, OSError):
            continue  # ended meanwhile
        sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"(\w+): +(\d+) kB", rollup)}
        if not sizes.get("Pss"):
            continue
        total += sizes["Pss"]
        shared += sizes["Pss_Shmem"]
        files += sizes["Pss_File"]
        processes[role] += 1
        by_role[role] += sizes["Pss"] - sizes["Pss_Shmem"]
    by_role["object store"] = shared
    return Sample(total, shared, files, processes, by_role, cpu_seconds)


ROLES = (
    "driver",
    "replica",
    "tasks",
    "idle workers",
    "gcs_server",
    "raylet",
    "other",
    "object store",
)


def role_of(command: list[str]) -> str:
    name = command[0] if command else ""
    for part, role in (("Replica", "replica"), ("IDLE", "idle workers"), ("ray::", "tasks")):
        if part in name and name.startswith("ray::"):
            return role
    return next((role for role in ("gcs_server", "raylet") if name.endswith(role)), "other")


def _verdicts(peaks: dict[str, int]) -> list[str]:
    names = list(peaks)
    return [
        f"{large} against {small}: {peaks[large] / peaks[small]:.2f} times the memory, "
        + ("within" if peaks[large] <= ALLOWED_GROWTH * peaks[small] else "NOT within")
        + f" {ALLOWED_GROWTH:.2f}"
        for small, large in zip(names[::2], names[1::2], strict=False)
    ]


if __name__ == "__main__":
    main()
