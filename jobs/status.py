"""`tessera status`: how far a run is, from its commits and its progress record."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.commits import (
    RUNS,
    Commit,
    Dataset,
    Progress,
    committed_shards,
    read_commits,
    read_dataset,
)
from pipeline.storage import Storage, explained, join
from pipeline.versions import current, current_version

STAGES = ("read", "tile", "embed", "write")
LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Status:
    """`progress` is None when the last run ended well: nothing is then left of it. `version` is the
    one that `current.json` names, None where OUTPUT itself is what is read."""

    dataset: Dataset
    committed: int
    samples: int
    tiles: int
    rejects: int
    output_bytes: int
    seconds: Mapping[str, float]
    progress: Progress | None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("dataset", "progress")},
            "dataset": self.dataset.model_dump(mode="json"),
            "progress": None if self.progress is None else self.progress.model_dump(mode="json"),
        }


def read_status(output: str, storage_options: Mapping[str, Any]) -> Status:
    """Reads OUTPUT's records.

    Raises:
        UserError: OUTPUT is none of ours, or cannot be read.
    """
    storage = Storage(storage_options)
    version = current_version(output, storage)
    output = current(output, storage)
    dataset = read_dataset(output, storage)
    totals: Counter[str] = Counter()
    seconds = dict.fromkeys(STAGES, 0.0)
    with explained("read", output):
        shards = sorted(committed_shards(output, storage))
        for commit in told(read_commits(output, shards, storage), len(shards)):
            totals["samples"] += commit.samples
            totals["tiles"] += commit.tiles
            totals["rejects"] += commit.rejects
            totals["bytes"] += sum(part.total_bytes for part in commit.parts)
            for stage in STAGES:
                seconds[stage] += getattr(commit.seconds, stage)
        progress = newest_progress(output, storage)
    return Status(
        dataset=dataset,
        committed=len(shards),
        samples=totals["samples"],
        tiles=totals["tiles"],
        rejects=totals["rejects"],
        output_bytes=totals["bytes"],
        seconds={stage: round(spent, 3) for stage, spent in seconds.items()},
        progress=progress,
        version=version,
    )


def told(commits: Iterator[Commit], total: int) -> Iterator[Commit]:
    """Says on stderr how many are read, where it takes long."""
    due = time.monotonic() + LINE_SECONDS
    for number, commit in enumerate(commits, 1):
        yield commit
        if time.monotonic() >= due:
            due += LINE_SECONDS
            print(f"{number} of {total} commits read", file=sys.stderr, flush=True)


def newest_progress(output: str, storage: Storage) -> Progress | None:
    """What the last run wrote of itself; None where it ended well."""
    runs = join(output, RUNS)
    names = sorted(n for n in storage.iter_files(runs, depth=2) if n.endswith("/progress.json"))
    if not names:
        return None
    url = join(runs, names[-1])
    return Progress.parse(storage.read(url), url)
