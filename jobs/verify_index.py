"""`tessera verify INDEX`: proves that an index is whole, and that it holds what OUTPUT has."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from model.errors import UserError
from pipeline.commits import committed_shards, read_commits
from pipeline.index_audit import commit_problems, leftover_problems, part_problems
from pipeline.index_record import IndexRecord, read_record
from pipeline.index_sample import PlannedShard
from pipeline.printable import printable
from pipeline.read import open_output
from pipeline.storage import Storage, explained, redact

NUM_PARTS_AT_ONCE = 4


@dataclass(frozen=True)
class IndexVerification:
    """What was found; the index is whole, and up to date, if there are no problems."""

    index: str
    output: str
    segments: int
    shards: int
    vectors: int
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems), "whole": not self.problems}


def is_index(url: str, storage_options: Mapping[str, Any]) -> bool:
    """Whether a folder is an INDEX, not an OUTPUT."""
    return read_record(url, Storage(storage_options)) is not None


def verify_index(index: str, storage_options: Mapping[str, Any] | None = None) -> IndexVerification:
    """Checks the record, every file, and each shard against OUTPUT's commit.

    Raises:
        UserError: there is no index, or a storage cannot be used.
    """
    storage = Storage(storage_options or {})
    record = read_record(index, storage)
    if record is None:
        raise UserError(f"{redact(index)}: no index there")
    with explained("read", index):
        files = storage.list_files(index)
        parts = (record.model, *record.segments)
        with ThreadPoolExecutor(NUM_PARTS_AT_ONCE) as pool:
            found = pool.map(lambda part: part_problems(index, part, record, storage), parts)
            problems = [problem for some in found for problem in some]
    problems += leftover_problems(record, files)
    problems += _differences(record, storage)
    live = [s for segment in record.segments for s in segment.shards if s.live]
    return IndexVerification(
        index=redact(index),
        output=record.output,
        segments=len(record.segments),
        shards=len(live),
        vectors=record.live_vectors,
        problems=tuple(problems),
    )


def _differences(record: IndexRecord, storage: Storage) -> list[str]:
    """How the index differs from what is committed now."""
    opened = open_output(record.output, storage)
    with explained("read", opened.folder):
        names = sorted(committed_shards(opened.folder, storage))
        shards = [PlannedShard.of(c) for c in read_commits(opened.folder, names, storage)]
    return commit_problems(record, opened.version, opened.dataset.fingerprint, shards)


def show_index_verification(report: IndexVerification) -> None:
    console = Console()
    table = Table.grid(padding=(0, 2))
    for name, value in [
        ("index", report.index),
        ("of", report.output),
        ("shards", f"{report.shards:,}"),
        ("vectors", f"{report.vectors:,}; segments: {report.segments}"),
    ]:
        table.add_row(name, printable(value))
    console.print(table, highlight=False, markup=False)
    for problem in report.problems:
        line = printable(f"problem: {problem}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("not whole" if report.problems else "whole", highlight=False)
