"""What a suite of faults found: every kill, and a row for each kind of fault."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import Table, write_result
from chaos.faults import AGAIN
from chaos.rounds import Kill

COLUMNS = (
    *("number", "fault", "victim", "phase", "seconds into the run", "exit status", "said"),
    *("run ended after (s)", "next commit after (s)", "runs needed after it", "outcome"),
)


@dataclass(frozen=True)
class FaultRow:
    """A row of docs/reliability.md. Any suite may write a list of them, as JSON, to
    benchmarks/results/<date>-faults-<suite>.json; see `chaos.reliability`.
    """

    fault: str
    injected: int
    happened: str
    promised: str
    suite: str


def write_rows(rows: Sequence[FaultRow], suite: str, folder: Path) -> None:
    name = f"{datetime.now(UTC).date().isoformat()}-faults-{suite}.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def fault_rows(kills: Sequence[Kill]) -> list[FaultRow]:
    """One row for each kind, in the order in which kinds first came."""
    kinds: dict[str, list[Kill]] = {}
    for kill in sorted(kills, key=lambda kill: kill.strike.fault.place):
        kinds.setdefault(kill.strike.fault.name, []).append(kill)
    return [
        FaultRow(name, len(struck), happened(struck), struck[0].strike.fault.promised, "chaos")
        for name, struck in kinds.items()
    ]


def happened(kills: Sequence[Kill]) -> str:
    """The kills of one kind in words."""
    parts = []
    if went_on := sum(kill.exit_status == 0 for kill in kills):
        parts.append(f"{_of(went_on, kills)} the run went on and ended whole")
    ended = [kill for kill in kills if kill.exit_status != 0]
    if ended and ended[0].strike.fault.promised != AGAIN:
        # `Round` has made sure of that: else it is a broken promise.
        parts.append(f"{_of(len(ended), kills)} a later fault ended the same run")
        ended = []
    for status in sorted({kill.exit_status for kill in ended}, key=str):
        some = [kill for kill in ended if kill.exit_status == status]
        how = f"ended with {status}" if status != -9 else "was dead"
        followed = f"the run {how}, and OUTPUT was whole when it had been run again"
        parts.append(f"{_of(len(some), kills)} {followed}")
    waited = [kill.recovered_after for kill in kills if kill.recovered_after is not None]
    if waited:
        parts.append(
            f"next commit after {median(waited):.0f} s (median), {max(waited):.0f} s (most)"
        )
    bad = sum(bool(kill.problems) for kill in kills)
    parts.append(f"PROMISE BROKEN {bad} times" if bad else "every byte the same")
    return "; ".join(parts)


def _of(count: int, kills: Sequence[Kill]) -> str:
    return "each time" if count == len(kills) else f"{count} of {len(kills)} times"


def record(
    about: dict[str, Any],
    seed: int,
    minutes: float,
    kills: Sequence[Kill],
    problems: Sequence[str],
    folder: Path,
    settings: Mapping[str, str],
) -> str:
    """Writes both files; gives the Markdown."""
    rows = fault_rows(kills)
    write_rows(rows, "chaos", folder)
    tables = [
        Table(
            "Faults",
            ("fault", "injected", "happened"),
            tuple((row.fault, row.injected, row.happened) for row in rows),
        ),
        Table("Kills", COLUMNS, tuple(map(_cells, kills))),
    ]
    notes = [
        f"Seed {seed}, {minutes:.1f} minutes, {len(kills)} faults.",
        *(f"PROBLEM: {problem}" for problem in problems),
        f"Ray with {', '.join(f'{name}={value}' for name, value in settings.items())}.",
    ]
    return write_result("chaos", "cpu", about, tables, notes, folder)


def _cells(kill: Kill) -> tuple[str | int | float | None, ...]:
    recovered = None if kill.recovered_after is None else round(kill.recovered_after, 1)
    return (
        *(kill.strike.number, kill.strike.fault.name, kill.victim, kill.phase),
        *(round(kill.seconds, 1), kill.exit_status, kill.said.replace("|", "/")),
        *(round(kill.ended_after, 1), recovered, kill.runs_after),
        "; ".join(kill.problems) or "same bytes",
    )
