"""What a `tessera reindex` is about to do: a table for people, a document for `--json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from pipeline.comparison import CLASSES, Comparison, Totals
from pipeline.printable import printable

MEANING = {
    "new": "embedded",
    "changed": "embedded in part",
    "retry": "rejects tried again",
    "unchanged": "left as they are",
    "vanished": "kept",
}
PRUNED = "removed (--prune)"


class ClassPlan(BaseModel):
    """Sums over the shards of a class; None where nothing committed tells them.

    Those of new shards are estimates, from the committed ones' pictures and tiles a byte. Tiles of
    changed shards count what may be taken over: they are the most there can be to compute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: int
    pictures: int | None
    tiles: int | None
    device_hours: float | None


class ReindexPlan(BaseModel):
    """`folder` is what is worked on: OUTPUT, or `version` below it. `switches`: readers look
    elsewhere now, and will be led there when all of INPUT is committed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str
    folder: str
    version: str | None
    fingerprint: str
    switches: bool
    classes: dict[str, ClassPlan]


@dataclass(frozen=True)
class Rates:
    """Means over committed shards; None where there are none."""

    pictures_a_byte: float | None
    tiles_a_byte: float | None
    device_seconds_a_tile: float | None

    @staticmethod
    def of(totals: Iterable[Totals]) -> Rates:
        known = list(totals)
        num_bytes = sum(some.source_bytes for some in known)
        computed = sum(some.computed for some in known)
        return Rates(
            sum(some.pictures for some in known) / num_bytes if num_bytes else None,
            sum(some.tiles for some in known) / num_bytes if num_bytes else None,
            sum(some.device_seconds for some in known) / computed if computed else None,
        )


def plan_classes(compared: Comparison, rates: Rates) -> dict[str, ClassPlan]:
    return {name: _plan_class(name, compared.totals[name], rates) for name in CLASSES}


def _plan_class(name: str, totals: Totals, rates: Rates) -> ClassPlan:
    pictures: int | None = totals.pictures
    tiles: int | None = totals.tiles
    if name == "new" and totals.shards:
        pictures = _times(totals.source_bytes, rates.pictures_a_byte)
        tiles = _times(totals.source_bytes, rates.tiles_a_byte)
    hours = None
    if tiles is not None and rates.device_seconds_a_tile is not None:
        hours = round(tiles * rates.device_seconds_a_tile / 3600, 6)
    return ClassPlan(
        shards=totals.shards,
        pictures=pictures,
        tiles=tiles,
        device_hours=hours if tiles else 0.0 if tiles == 0 else None,
    )


def _times(count: int, rate: float | None) -> int | None:
    return None if rate is None else round(count * rate)


def show_plan(plan: ReindexPlan, prune: bool, on_stderr: bool) -> None:
    console = Console(stderr=on_stderr)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "shards", "pictures", "tiles", "device hours"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("")
    for name, sums in plan.classes.items():
        if name == "retry" and not sums.shards:
            continue
        about = "about " if name == "new" and sums.tiles else ""
        table.add_row(
            name,
            f"{sums.shards:,}",
            "?" if sums.pictures is None else f"{about}{sums.pictures:,}",
            "?" if sums.tiles is None else f"{about}{sums.tiles:,}",
            "?" if sums.device_hours is None else f"{sums.device_hours:.3g}",
            PRUNED if name == "vanished" and prune else MEANING[name],
        )
    lines = [f"output  {printable(plan.folder)}"]
    if plan.switches:
        lines.append("readers are led there when all of INPUT is committed, and not before")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table, highlight=False)
