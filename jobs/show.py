"""Results as people read them, on stdout."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from pipeline.printable import printable
from pipeline.records import shown_shape
from pipeline.storage import redact

if TYPE_CHECKING:
    from jobs.extract import Summary
    from jobs.reindex import Reindexed
    from jobs.status import Status
    from jobs.verify import Verification
    from pipeline.commits import Progress

STALE_SECONDS = 60.0  # a live run writes its progress record every ten seconds


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, printable(value))
    return table


def show_summary(summary: Summary, output: str) -> None:
    console = Console()
    if summary.shards == summary.committed_before:
        console.print(f"nothing to do: all {summary.shards} shards are committed", highlight=False)
        return
    rate = summary.tiles / summary.seconds if summary.seconds else 0.0
    before = f", {summary.committed_before} before" if summary.committed_before else ""
    rows = [
        ("shards", f"{summary.committed} of {summary.shards} committed{before}"),
        ("pictures", f"{summary.samples:,}"),
        ("tiles", f"{summary.tiles:,}"),
        ("rejects", _counts(summary.rejects)),
        ("speed", f"{rate:.1f} tiles/s over {summary.seconds:.1f} s, start of Ray included"),
        ("output", redact(output)),
    ]
    console.print(_table(rows), highlight=False, markup=False)
    for failure in summary.failures:
        console.print(
            printable(f"failed: {failure.shard}: {failure.reason}"), markup=False, soft_wrap=True
        )
    if summary.interrupted is not None:
        console.print("stopped; what is committed stays, run it again to go on")
    elif summary.failures:
        console.print(f"{len(summary.failures)} shards failed; run it again to try them again")


def show_reindexed(done: Reindexed) -> None:
    """What was done; the plan has been told before."""
    if done.run is None:
        return
    console = Console()
    if done.run.shards == done.run.committed_before:
        console.print("nothing to compute: all shards are as they were", highlight=False)
    else:
        show_summary(done.run, done.plan.folder)
        reused, tiles = done.run.reused, done.run.tiles
        share = f" ({reused / tiles:.1%})" if tiles else ""
        line = f"taken over: {reused:,} of {tiles:,} tiles{share}; {tiles - reused:,} computed"
        console.print(line, highlight=False)
    for name, shards in (("pruned", done.pruned), ("not pruned", done.kept)):
        if shards:
            console.print(f"{name}: {len(shards)} shards", highlight=False)
    if done.left_behind:
        console.print(
            f"readers stay where they are: they would lose {done.left_behind:,} shards",
            highlight=False,
        )
    if done.switched:
        line = printable(f"readers are led to {done.plan.folder} now")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _counts(rejects: dict[str, int]) -> str:
    total = sum(rejects.values())
    codes = ", ".join(f"{code} {count}" for code, count in sorted(rejects.items()))
    return f"{total} ({codes})" if total else "0"


def show_status(status: Status, output: str) -> None:
    dataset, progress = status.dataset, status.progress
    rows = [
        ("output", redact(output)),
        *([("version", status.version)] if status.version else []),
        ("model", dataset.model + (f" @ {dataset.revision[:12]}" if dataset.revision else "")),
        ("tiling", str(dataset.settings["tiling"])),
        ("features", ", ".join(f"{k} {shown_shape(v)}" for k, v in dataset.features.items())),
        ("fingerprint", dataset.fingerprint[:12]),
        ("committed", f"{status.committed} shards, {status.samples:,} pictures"),
        ("tiles", f"{status.tiles:,} ({ByteSize(status.output_bytes).human_readable()})"),
        ("rejects", f"{status.rejects:,}"),
        ("work", ", ".join(f"{k} {v:.1f} s" for k, v in status.seconds.items())),
    ]
    rows.append(("last run", run_state(progress)))
    if progress is not None:
        done = progress.committed + len(progress.failures) + progress.more_failures
        rows.append(("", f"{done} of {progress.shards} shards, {progress.tiles:,} tiles"))
        rows += [("failed", f"{f.shard}: {f.reason}") for f in progress.failures]
        if progress.more_failures:
            rows.append(("failed", f"{progress.more_failures} more"))
    Console().print(_table(rows), highlight=False, markup=False)


def run_state(progress: Progress | None) -> str:
    """How the last run is doing, or ended, by its progress record."""
    if progress is None:
        return "ended well"
    if progress.ended:
        return f"ended {progress.updated_at} with shards left; run it again"
    age = (datetime.now(UTC) - datetime.fromisoformat(progress.updated_at)).total_seconds()
    if age < STALE_SECONDS:
        return f"going on, {progress.tiles_per_second:g} tiles/s"
    return f"died: nothing heard since {progress.updated_at}; run it again"


def show_verification(report: Verification, output: str) -> None:
    console = Console()
    rows = [
        ("output", redact(output)),
        *([("version", report.version)] if report.version else []),
        ("shards", f"{report.shards:,}"),
        (
            "samples",
            f"{report.samples:,} = {report.embedded:,} embedded + {report.rejects:,} rejects",
        ),
        ("tiles", f"{report.tiles:,}"),
    ]
    if report.recomputed is not None:
        rows.append(("recomputed", report.recomputed))
    console.print(_table(rows), highlight=False, markup=False)
    for problem in report.problems:
        console.print(
            printable(f"problem: {problem}"), markup=False, highlight=False, soft_wrap=True
        )
    console.print("not whole" if report.problems else "whole", highlight=False)
