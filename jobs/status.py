"""`tessera status`: how far a run is, from its commits and its progress record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.commits import (
    RUNS,
    Dataset,
    Progress,
    committed_shards,
    read_commits,
    read_dataset,
)
from pipeline.storage import Storage, explained, join


@dataclass(frozen=True)
class Status:
    """`progress` is None when the last run ended well: nothing is then left of it."""

    dataset: Dataset
    committed: int
    samples: int
    tiles: int
    rejects: int
    output_bytes: int
    seconds: Mapping[str, float]
    progress: Progress | None

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
    dataset = read_dataset(output, storage)
    with explained("read", output):
        commits = read_commits(output, sorted(committed_shards(output, storage)), storage)
        progress = _newest_progress(output, storage)
    seconds = {
        stage: round(sum(getattr(commit.seconds, stage) for commit in commits), 3)
        for stage in ("read", "tile", "embed", "write")
    }
    return Status(
        dataset=dataset,
        committed=len(commits),
        samples=sum(commit.samples for commit in commits),
        tiles=sum(commit.tiles for commit in commits),
        rejects=sum(commit.rejects for commit in commits),
        output_bytes=sum(part.bytes for commit in commits for part in commit.parts),
        seconds=seconds,
        progress=progress,
    )


def _newest_progress(output: str, storage: Storage) -> Progress | None:
    runs = join(output, RUNS)
    names = sorted(n for n in storage.list_files(runs) if n.endswith("/progress.json"))
    if not names:
        return None
    url = join(runs, names[-1])
    return Progress.parse(storage.read(url), url)
