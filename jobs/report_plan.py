"""The plan that was made before a run, beside what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.report_figures import Figures
from model.errors import UserError

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PlannedTotals(BaseModel):
    """Totals over INPUT that `tessera plan --json` tells under `chosen`; the rest is not needed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pictures: Amount
    tiles: Amount
    rejects: Amount
    read_bytes: Amount
    output_bytes: Amount
    device_hours: Amount
    wall_seconds: Amount
    tiles_per_second: Amount
    tile_counts: dict[int, Amount] = {}


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    chosen: PlannedTotals


@dataclass(frozen=True)
class Comparison:
    """`due` is what the plan says for the pictures that are done; None where it does not grow with
    them. `actual` is None where it is not known."""

    name: str
    unit: str
    planned: float
    due: float | None
    actual: float | None

    @property
    def difference(self) -> float | None:
        """The actual value against the plan, as a share of the plan."""
        expected = self.planned if self.due is None else self.due
        return None if self.actual is None or not expected else self.actual / expected - 1


def read_plan(file: Path) -> PlannedTotals:
    """Reads what `tessera plan INPUT --json` printed.

    Raises:
        UserError: it is not that.
    """
    try:
        return _Document.model_validate_json(file.read_bytes()).chosen
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(
            f"{file}: {where}: {first['msg']}; expected the document of `tessera plan --json`"
        ) from error


def compare(
    plan: PlannedTotals, figures: Figures, active_seconds: float | None
) -> list[Comparison]:
    """`active_seconds` is the time in which shards were committed, if that can be told."""
    done = figures.pictures / plan.pictures if plan.pictures else 0.0
    hours = figures.device_seconds / 3600 if figures.replicas else None
    rate = figures.tiles / active_seconds if active_seconds else None
    grows: list[tuple[str, str, float, float | None]] = [
        ("pictures", "", plan.pictures, figures.pictures),
        ("tiles", "", plan.tiles, figures.tiles),
        ("rejects", "", plan.rejects, figures.rejects),
        ("read", "bytes", plan.read_bytes, figures.source_bytes),
        ("output", "bytes", plan.output_bytes, figures.output_bytes),
        ("device hours, while computing", "h", plan.device_hours, hours),
        ("wall time", "s", plan.wall_seconds, active_seconds),
    ]
    rows = [Comparison(name, unit, value, value * done, now) for name, unit, value, now in grows]
    return [*rows, Comparison("tiles/s", "", plan.tiles_per_second, None, rate)]
