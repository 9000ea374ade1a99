"""How much memory does each process of a job over tokens take?

python -m benchmarks.tokens_memory [--results FOLDER]

Two real local jobs, the second of four times the pictures, one tile each. The network is one block
of 1600 channels, small enough for a CPU; in float32 its tokens are 1025 x 1600 x 4 bytes = 6.56 MB
a tile, as the 6B's are in float16. Sampled is what each process holds of its own: resident and not
in the object store.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.dataset import SMALL_MODEL, laion_like, write_shards, write_small_model
from benchmarks.memory import ROLES, role_of
from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result

SAMPLE_SECONDS = 0.1
MIB = 2**20
MODEL = replace(SMALL_MODEL, hidden_size=1600, num_layers=1, num_heads=25, intermediate_size=64)
OPTIONS = (
    "--dtype float32 --features tokens --format webdataset --embedding-dtype float32 --carry txt"
)
PICTURES = (40, 160)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a job over tokens.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    pictures = laion_like()
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        model = write_small_model(folder / "model", MODEL)
        for count in PICTURES:
            tars = write_shards(folder / f"in-{count}", 1, count, pictures)
            output = folder / f"out-{count}"
            command = [sys.executable, "-m", "jobs.cli", "extract", str(tars), str(output)]
            began = time.perf_counter()
            peaks, store = watch([*command, "--model", str(model), *OPTIONS.split()])
            seconds = time.perf_counter() - began
            written = sum(path.stat().st_size for path in output.rglob("*.tar"))
            rows.append((count, round(written / 1e6), round(seconds), round(store / MIB),
                         *(round(peaks[role] / MIB) for role in ROLES[:-1])))  # fmt: skip
            print(rows[-1], file=sys.stderr)
    table = Table(
        "Peak of the largest process of each kind, without the object store, MiB",
        ("pictures", "MB written", "seconds", "object store, all", *ROLES[:-1]),
        tuple(rows),
    )
    notes = [
        f"resident and not shared memory, every {SAMPLE_SECONDS} s; object store: what all "
        "processes have of shared memory, proportionally",
        f"options: {OPTIONS}; one tile a picture; chunks of ten tiles",
    ]
    print(write_result("tokens-memory", "cpu", about, [table], notes, options.results))


def watch(command: list[str]) -> tuple[dict[str, int], int]:
    """Runs a command; gives the peak of the largest process of each kind, and the store's."""
    peaks: dict[str, int] = defaultdict(int)
    store = 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": "local"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            store = max(store, sample(process.pid, peaks))
            try:
                process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read())
    return peaks, store


def sample(pid: int, peaks: dict[str, int]) -> int:
    shared = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            role = "driver" if process.pid == pid else role_of(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.Error, OSError):
            continue  # ended meanwhile
        sizes = {
            key: int(kib) * 1024 for key, kib in re.findall(r"(\w+):\s+(\d+) kB", status + rollup)
        }
        if "RssAnon" in sizes:
            peaks[role] = max(peaks[role], sizes["RssAnon"] + sizes["RssFile"])
            shared += sizes.get("Pss_Shmem", 0)
    return shared


if __name__ == "__main__":
    main()
