"""The job that is struck: `tessera extract` as users start it; some of its pictures are bad."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from tests.builders import REPOSITORY, picture, sample, write_checkpoint, write_tar

NUM_SHARDS = 24
PICTURES = 10
BAD_EVERY = 4  # one shard in so many holds a picture that breaks off
IMAGE_SIZE = 336  # the replica is at work for some ten seconds, so that strikes find it there
RANK_PATIENCE_SECONDS = 5.0  # users have 120
SPILLING = re.compile(r'File "(\S+/ray/_private/external_storage\.py|python/ray/_raylet\.pyx)"')
OPTIONS = (
    *("--tiling", "dynamic", "--max-tiles", "2", "--dtype", "float32"),
    *("--features", "cls,mean", "--batch-tiles", "2"),
)


@dataclass(frozen=True)
class Job:
    """What is computed. `ranks` is its tensor_parallel; other ranks give other last bits."""

    inputs: Path
    model: Path
    ranks: int = 1

    def command(self, output: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "chaos.driver", str(RANK_PATIENCE_SECONDS)),
            *("extract", str(self.inputs), str(output), "--model", str(self.model)),
            *(*OPTIONS, "--tensor-parallel", str(self.ranks)),
        ]


def make_job(folder: Path) -> Job:
    for shard in range(NUM_SHARDS):
        members = []
        for index in range(PICTURES):
            image = picture(300 + 20 * index, 260, seed=100 * shard + index)
            if shard % BAD_EVERY == 0 and index == 2:
                image = image[:1000]
            members += sample(f"{index:03d}", image, f"caption {index}")
        write_tar(folder / "in" / f"{shard:05d}.tar", members)
    return Job(folder / "in", write_checkpoint(folder / "model", image_size=IMAGE_SIZE))


@dataclass
class Run:
    """One driver: started now, and what came of it."""

    process: subprocess.Popen[bytes]
    errors: Path
    began: float = field(default_factory=time.monotonic)

    @staticmethod
    def start(job: Job, output: Path, address: str, errors: Path) -> Run:
        with errors.open("wb") as sink:
            process = subprocess.Popen(
                job.command(output),
                env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL,
                stderr=sink,
                start_new_session=True,
                cwd=REPOSITORY,
            )
        return Run(process, errors)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def said(self) -> list[str]:
        """The driver's own lines; those of workers have a `(title pid=…)` in front."""
        lines = self.errors.read_text(errors="replace").splitlines()
        return [line for line in lines if line and not line.startswith(("(", "\x1b"))]

    def shows_traceback(self) -> bool:
        """Whether the driver printed one of its own.

        Where Ray cannot spill, its processes print theirs, which come without a mark on each line:
        they are known by their frames.
        """
        lines = self.said()
        blocks = [
            list(takewhile(lambda line: line.startswith(" "), lines[number + 1 :]))
            for number, line in enumerate(lines)
            if line.startswith("Traceback")
        ]
        frames = [[line for line in block if line.startswith("  File ")] for block in blocks]
        return any(not block or not all(map(SPILLING.search, block)) for block in frames)
