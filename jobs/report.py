"""`tessera report`: one HTML file about an OUTPUT, while its run goes on or after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.report_examples import add_pictures, find_examples
from jobs.report_figures import gather
from jobs.report_html import Report, page
from jobs.report_plan import PlannedTotals, compare, read_plan
from jobs.report_sizes import sample_sizes
from jobs.report_time import timeline
from jobs.show import run_state
from jobs.status import newest_progress, told
from model.errors import UserError
from pipeline.commits import committed_shards, read_commits, read_dataset
from pipeline.shards import list_shards
from pipeline.storage import Storage, explained
from pipeline.versions import current


def write_report(
    output: str,
    out: Path,
    plan_file: Path | None = None,
    inputs: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Reads OUTPUT and writes the page to `out`.

    Args:
        plan_file: what `tessera plan --json` printed.
        inputs: INPUT, for pictures of rejects, where it cannot be read by the commits' addresses.

    Raises:
        UserError: OUTPUT is none of ours, or cannot be read; the plan is none; `out` cannot be
            written.
    """
    storage = Storage(storage_options or {})
    plan = None if plan_file is None else read_plan(plan_file)
    urls = {shard.name: shard.url for shard in list_shards(inputs, storage)} if inputs else {}
    report = read_report(current(output, storage), plan, urls, storage)
    try:
        out.write_text(page(report))
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written: {error.strerror}") from error


def read_report(
    output: str, plan: PlannedTotals | None, urls: Mapping[str, str], storage: Storage
) -> Report:
    """Everything the page shows. What of the examples cannot be read is told there."""
    dataset = read_dataset(output, storage)
    with explained("read", output):
        shards = sorted(committed_shards(output, storage))
        figures = gather(told(read_commits(output, shards, storage), len(shards)))
        progress = newest_progress(output, storage)
    times = timeline(figures.moments, figures.moment_tiles)
    examples = find_examples(figures.code_shards, output, storage)
    add_pictures(examples, figures.code_shards, urls, storage)
    active = None if times is None else times.active_seconds
    return Report(
        output=output,
        made_at=datetime.now(UTC),
        dataset=dataset,
        state=f"Last run: {run_state(progress)}.",
        failures=() if progress is None else progress.failures,
        figures=figures,
        timeline=times,
        sizes=sample_sizes(figures.sampled_parts, output, storage),
        examples=examples,
        planned=() if plan is None else compare(plan, figures, active),
        planned_tiles={} if plan is None else plan.tile_counts,
    )
