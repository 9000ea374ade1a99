"""A device's rate from a result file of `python -m benchmarks.encoder`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.device_tables import NO_FLOAT32, Device, DeviceTable, Measured
from model.errors import UserError

MAX_BYTES = 4 << 20
NETWORK = "The network"  # the titles of its tables begin so
ENCODE = "`encode`"
WORK = re.compile(r"([\d.eE+-]+) TFLOP a tile")
OURS = {"fp8": "ours, fp8"}  # else the row of bfloat16


class _Document(BaseModel):
    """What is needed of a result file; the rest of it is left alone."""

    model_config = ConfigDict(extra="ignore")


class _Table(_Document):
    title: str
    columns: list[str]
    rows: list[list[Any]]


class _Gpu(_Document):
    name: str


class _Result(_Document):
    what: str
    date: str
    gpu: _Gpu | None
    tables: list[_Table]
    notes: list[str]


def read_benchmark(file: Path, table: DeviceTable, dtype: str) -> tuple[Device, Measured]:
    """The device of a result file, and what was measured on it.

    Raises:
        UserError: it is no such file, is of a CPU, or of a device that the table lacks; or the
            benchmark has no rate of this `dtype`.
    """
    if dtype == "float32":
        raise UserError(NO_FLOAT32)
    result = _read(file)
    if result.gpu is None:
        raise UserError(
            f"{file}: measured on a CPU; the speed of a CPU is measured by `plan` itself "
            "(--fleet cpu --model FOLDER)"
        )
    device = table.called(result.gpu.name)
    if device is None:
        raise UserError(
            f"{file}: the table of devices has no {result.gpu.name}; add it to a copy of the "
            "table and give that as --devices"
        )
    row = OURS.get(dtype, "ours, bfloat16")
    rate = _rate(result, row)
    work = next((found for note in result.notes if (found := WORK.search(note))), None)
    if rate is None or work is None:
        raise UserError(f"{file}: has no tiles/s of {row!r}, or no work of a tile")
    source = f"{file.name}, {result.date}, {result.gpu.name}"
    return device, Measured(tiles_per_second=rate, tflop_per_tile=float(work[1]), source=source)


def _read(file: Path) -> _Result:
    try:
        with file.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        result = _Result.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: no result of a benchmark: {where}: {first['msg']}") from error
    if result.what != "encoder":
        raise UserError(f"{file}: a result of {result.what!r}; expected one of encoder")
    return result


def _rate(result: _Result, row: str) -> float | None:
    """Tiles/s of the public `encode`, with its copies; else of the network at its best batch."""
    for title in (ENCODE, NETWORK):
        rates = [
            float(cells[table.columns.index("tiles/s")])
            for table in result.tables
            if table.title.startswith(title) and "tiles/s" in table.columns
            for cells in table.rows
            if cells and cells[0] == row and isinstance(_at(cells, table), int | float)
        ]
        if rates:
            return max(rates)
    return None


def _at(cells: list[Any], table: _Table) -> Any:
    at = table.columns.index("tiles/s")
    return cells[at] if at < len(cells) else None
