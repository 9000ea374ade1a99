"""What `tessera index` is to do, on stderr; what it has done, on stdout."""

from __future__ import annotations

import sys

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from jobs.index_outcome import Estimate, Indexed
from pipeline.index_record import IndexRecord
from pipeline.printable import printable
from pipeline.storage import redact

RAY_BYTES = 600 << 20  # measured: 431 to 575 MiB


def show_estimate(estimate: Estimate) -> None:
    """Before anything is done: the kind, what is read, and what memory that takes."""
    if estimate.reasons:
        _say(f"a new index: {'; '.join(estimate.reasons)}")
    if not estimate.segments_to_build:
        return
    _say(
        f"{estimate.kind}, {estimate.vectors:,} vectors of {estimate.width}, "
        f"{_size(estimate.index_bytes)}; {estimate.vectors_to_read:,} of them to read; segments: "
        f"{estimate.segments_to_build} to build of {estimate.segments}"
    )
    model = (
        f"{_size(estimate.training_bytes)} for the model, then " if estimate.training_bytes else ""
    )
    tasks = f"{estimate.tasks_at_once} x {_size(estimate.task_bytes)}"
    where = ""
    if estimate.segments_to_build > 1:
        where = (
            " on this machine (on a cluster: one a CPU), and some "
            f"{_size(RAY_BYTES)} for Ray and this command"
        )
    _say(f"memory: {model}{tasks}{where}")


def show_indexed(done: Indexed, index: str) -> None:
    record = done.record
    table = Table.grid(padding=(0, 2))
    for name, value in [
        ("index", redact(index)),
        ("of", f"{record.output}, {record.feature}, {record.vector}"),
        ("kind", described(record)),
        ("vectors", f"{record.live_vectors:,}; segments: {len(record.segments)}"),
        ("shards", changes(done)),
        ("recall@10", recall(record)),
    ]:
        table.add_row(name, printable(value))
    Console().print(table, highlight=False, markup=False)


def described(record: IndexRecord) -> str:
    settings = record.parameters.model_dump(exclude={"kind"})
    return ", ".join([record.kind, *(f"{name} {value}" for name, value in settings.items())])


def changes(done: Indexed) -> str:
    if done.was_up_to_date:
        return "nothing to do: the index holds what is committed"
    counts = (("added", done.added), ("changed", done.changed), ("removed", done.removed))
    parts = [f"{len(names)} {what}" for what, names in counts if names]
    return f"{', '.join(parts) or 'none new'}; {done.seconds:.1f} s"


def recall(record: IndexRecord) -> str:
    if record.recall is None:
        return "not measured: there are no neighbours"
    return f"{record.recall.value:.3f} against exact search, over {record.recall.queries} queries"


def _size(num_bytes: int) -> str:
    return ByteSize(num_bytes).human_readable()


def _say(line: str) -> None:
    print(f"index: {printable(line)}", file=sys.stderr, flush=True)
