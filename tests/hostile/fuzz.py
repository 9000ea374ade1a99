"""The long run: mutated pictures and archives through the real stages, in children that may die.

    python -m tests.hostile.fuzz --cases 12000 --archives 2500 --seed 1

Writes benchmarks/results/<date>-hostile-input-cpu.{json,md}. Ends with 1 if a shard
did not come to its end at the second attempt, or its accounts did not balance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, Table, machine, write_result
from pipeline import stages
from pipeline.chunks import DirectDecoder
from pipeline.tiling import TilePlan, Tiling
from tests.builders import REPOSITORY, write_tar
from tests.hostile.archives import ARCHIVES, BLOCK, checked
from tests.hostile.pictures import case
from tests.hostile.stages import CountedAttempts, balance, run_stages

SHARD_PICTURES = 50
DEADLINE_SECONDS = 20.0
SILENCE_SECONDS = 120.0  # a child that says nothing for so long hangs


class TimedDecoder(DirectDecoder):
    """Tells how long each picture took, and how much memory beyond what was there."""

    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)
    current = -1

    def picture_size(self, data: bytes) -> tuple[int, int]:
        size: tuple[int, int] = self._timed(super().picture_size, data)
        return size

    def cut_tiles(self, data: bytes, plan: TilePlan, out: np.ndarray) -> None:
        self._timed(super().cut_tiles, data, plan, out)

    def _timed(self, do: Any, *arguments: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before, began = memory("VmRSS"), time.perf_counter()
        try:
            return do(*arguments)
        finally:
            seconds, peak = time.perf_counter() - began, memory("VmHWM") - before
            cls = TimedDecoder
            cls.slowest = max(cls.slowest, (round(seconds, 3), cls.current))
            cls.largest = max(cls.largest, (peak, cls.current))


def memory(name: str) -> int:
    """MiB, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10


def mutated_archive(seed: int, number: int) -> tuple[str, bytes]:
    """One of the kinds with up to five changes more; half of the headers get their checksum."""
    rng = random.Random(f"archive-{seed}-{number}")
    kind = rng.choice(sorted(ARCHIVES))
    data = bytearray(ARCHIVES[kind].build())
    for _ in range(rng.randrange(6)):
        if len(data) < BLOCK:
            break
        # the first blocks and the last; many kinds have a thousand equal ones between
        reach = rng.choice((min(len(data), 40 * BLOCK), len(data)))
        block = rng.randrange(reach // BLOCK) * BLOCK
        at = block + rng.choice((0, 100, 124, 148, 156, 157, 257, 345, 482, rng.randrange(BLOCK)))
        change = rng.randrange(7)
        if change == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif change == 1:
            data[at : at + 12] = rng.randbytes(12)
        elif change == 2:
            data[at : at + 12] = rng.choice((b"\xff" * 12, b"\x80" + bytes(11), b"77777777777\0"))
        elif change == 3:
            del data[block : block + BLOCK]
        elif change == 4:
            data[block:block] = data[: rng.choice((1, 2, 5)) * BLOCK]
        elif change == 5:
            data[block + 156 : block + 157] = bytes([rng.choice(b"0123457gxXLKSMVDNA\0")])
        else:
            del data[rng.randrange(len(data)) :]
        if rng.random() < 0.5 and len(data) >= block + BLOCK:
            data[block : block + BLOCK] = checked(data[block : block + BLOCK])
    return kind, bytes(data)


def picture_shard(folder: Path, seed: int, number: int, earlier: int) -> Iterator[tuple[str, str]]:
    """Tiles one shard of pictures; gives (sound picture, fate) of each."""
    first = number * SHARD_PICTURES
    cases = [case(seed, first + index) for index in range(SHARD_PICTURES)]
    path = write_tar(folder / "s.tar", [(f"{i:03}.jpg", data) for i, (_, data) in enumerate(cases)])
    tiling = Tiling(
        "center-crop" if number % 4 == 3 else "dynamic",
        tile_size=56,
        resize_to=64,
        max_tiles=6,
        resize="fast" if number % 2 else "exact",
    )
    attempts = CountedAttempts(earlier)
    chunks = run_stages(path, deadline_seconds=DEADLINE_SECONDS, tiling=tiling, attempts=attempts)
    outcome = balance(chunks)
    assert outcome.end.failure is None
    assert outcome.end.samples == SHARD_PICTURES
    for index, (name, _) in enumerate(cases):
        fate = outcome.rejects[index][1] if index in outcome.rejects else "embedded"
        yield Path(name).suffix.lstrip(".") or name, fate


def archive_shard(folder: Path, seed: int, number: int, earlier: int) -> Iterator[tuple[str, str]]:
    kind, data = mutated_archive(seed, number)
    path = folder / "s.tar"
    path.write_bytes(data)
    truncated = number % 2 == 1
    attempts = CountedAttempts(earlier)
    outcome = balance(
        run_stages(path, truncated, deadline_seconds=DEADLINE_SECONDS, attempts=attempts)
    )
    end = outcome.end
    if end.failure is not None:
        assert "unforeseen" not in end.failure, end.failure
    fate = "failed, with the reason" if end.failure is not None else "whole"
    yield kind, "cut, its whole samples taken" if end.truncated_at is not None else fate


def child(what: str, seed: int, start: int, stop: int, earlier: int) -> None:
    """Runs shards, and tells of each on stdout; before it starts, too."""
    warnings.simplefilter("ignore")
    stages.DirectDecoder = TimedDecoder  # type: ignore[misc]
    shard = picture_shard if what == "pictures" else archive_shard
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, stop):
            print(json.dumps({"begin": number}), flush=True)
            TimedDecoder.current = number
            Path("/proc/self/clear_refs").write_text("5")
            before, began = memory("VmRSS"), time.perf_counter()
            fates = list(shard(Path(folder), seed, number, earlier))
            told = {
                "number": number,
                "fates": fates,
                "seconds": time.perf_counter() - began,
                "peak_mib": memory("VmHWM") - before,
                "slowest": TimedDecoder.slowest,
                "largest": TimedDecoder.largest,
            }
            print(json.dumps(told), flush=True)


@dataclass
class Findings:
    """What a run of children told."""

    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)
    slowest_shard: tuple[float, int] = (0.0, -1)
    largest_shard: tuple[int, int] = (0, -1)
    ended: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)

    def take(self, told: dict[str, Any]) -> None:
        self.fates.update((name, fate) for name, fate in told["fates"])
        number = told["number"]
        self.slowest = max(self.slowest, tuple(told["slowest"]))
        self.largest = max(self.largest, tuple(told["largest"]))
        self.slowest_shard = max(self.slowest_shard, (round(told["seconds"], 3), number))
        self.largest_shard = max(self.largest_shard, (told["peak_mib"], number))


def run_children(what: str, seed: int, count: int) -> Findings:
    """Starts a child, and another one behind each shard that ended one.

    Such a shard is tried once more, as Ray does: now its pictures are decoded apart.
    """
    findings, at = Findings(), 0
    while at < count:
        at, how = _run_child(findings, what, seed, at, count, 0)
        if how is not None:
            findings.ended.append(f"{what} {at}: {how}")
            after, again = _run_child(findings, what, seed, at, at + 1, 1)
            if again is not None:
                findings.died.append(f"{what} {after}: {again}")
            at += 1
    return findings


def _run_child(
    findings: Findings, what: str, seed: int, at: int, stop: int, earlier: int
) -> tuple[int, str | None]:
    """Gives the shard at which it ended, and how if that was not the last."""
    command = [sys.executable, "-m", "tests.hostile.fuzz", "--child", what]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, *map(str, (seed, at, stop, earlier))],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        silence = _killed_after_silence(process)
        for line in process.stdout:
            silence.cancel()
            silence = _killed_after_silence(process)
            told = json.loads(line)
            if "begin" in told:
                at = told["begin"]
            else:
                findings.take(told)
                at += 1
        silence.cancel()
        if process.wait() == 0:
            return at, None
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
        how = f"status {process.returncode}: {lines[-1] if lines else ''}"
        print(f"{what} {at}", *lines[-12:], sep="\n", file=sys.stderr, flush=True)
        return at, how


def _killed_after_silence(process: subprocess.Popen[str]) -> threading.Timer:
    timer = threading.Timer(SILENCE_SECONDS, process.kill)
    timer.start()
    return timer


def tables(pictures: Findings, archives: Findings) -> list[Table]:
    codes = sorted({fate for _, fate in pictures.fates})
    names = sorted({name for name, _ in pictures.fates})
    rows = [(name, *(pictures.fates[name, code] for code in codes)) for name in names]
    total = ("all", *(sum(pictures.fates[name, code] for name in names) for code in codes))
    fates = Counter[str]()
    for (_, fate), count in archives.fates.items():
        fates[fate] += count
    return [
        Table("Mutated pictures, by what they were made from", ("format", *codes), (*rows, total)),
        Table("Mutated archives", ("ended as", "count"), tuple(sorted(fates.items()))),
        Table(
            "Worst",
            ("what", "pictures", "archives"),
            (
                ("cases", pictures.fates.total(), archives.fates.total()),
                ("workers that ended", len(pictures.ended), len(archives.ended)),
                ("of them at the second attempt, too", len(pictures.died), len(archives.died)),
                ("slowest picture, s", pictures.slowest[0], archives.slowest[0]),
                ("largest picture, MiB above the worker", pictures.largest[0], archives.largest[0]),
                ("slowest shard, s", pictures.slowest_shard[0], archives.slowest_shard[0]),
                ("largest shard, MiB", pictures.largest_shard[0], archives.largest_shard[0]),
            ),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="mutated pictures")
    parser.add_argument("--archives", type=int, default=2_000, help="mutated archives")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    about = machine()
    began = time.monotonic()
    pictures = run_children("pictures", options.seed, -(-options.cases // SHARD_PICTURES))
    archives = run_children("archives", options.seed, options.archives)
    died = pictures.died + archives.died
    notes = [
        f"seed {options.seed}; {time.monotonic() - began:.0f} s; pictures in shards of "
        f"{SHARD_PICTURES}, half of them with `resize: fast`; archives half with accept_truncated",
        "every shard went through read_stage and tile_stage, and its samples = embedded + rejects, "
        "with codes of the closed set of docs/output.md",
        *(f"worker ended: {how}" for how in pictures.ended + archives.ended),
        *(f"FAILED at the second attempt: {how}" for how in died),
    ]
    print(
        write_result(
            "hostile-input",
            "cpu",
            about,
            tables(pictures, archives),
            notes,
            options.results,
        )
    )
    sys.exit(bool(died))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
