"""A plan as people read it, on stdout."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jobs.plan_document import Comparison, Interval, Option, Plan
from jobs.terminal import clock
from pipeline.printable import printable

GIGA = 1e9


def show_plan(plan: Plan) -> None:
    console = Console()
    for title, rows in (
        ("INPUT", _input(plan)),
        (f"on {plan.fleet.name}", _chosen(plan)),
        ("it rests on", _rates(plan)),
    ):
        console.print(_grid(title, rows), highlight=False, markup=False)
    for comparison in plan.comparisons:
        console.print(_comparison(comparison, plan), highlight=False, markup=False)
    for sentence in plan.advice:
        console.print(printable(sentence), highlight=False, markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(printable(f"note: {note}"), highlight=False, markup=False, soft_wrap=True)


def _input(plan: Plan) -> list[tuple[str, str]]:
    sample = plan.sample
    whole = sample.shards == sample.of_shards
    rows = [
        (
            "sample",
            f"{sample.shards:,} of {sample.of_shards:,} shards, {_bytes(sample.bytes)} of "
            f"{_bytes(sample.of_bytes)}, {sample.pictures:,} headers, "
            f"{sample.decoded_pictures:,} decoded; seed {sample.seed}",
        ),
        ("pictures", _interval(plan.pictures, whole)),
        ("tiles", _interval(plan.tiles, whole)),
        ("rejects", _interval(plan.rejects, whole)),
        ("pictures by tiles", _histogram(plan.chosen.tile_counts)),
    ]
    if sample.missing:
        rows.append(("missing", f"{sample.missing:,} shards of INPUT are not there"))
    rows += [("would fail", f"{name}: {why}") for name, why in list(sample.broken.items())[:5]]
    return rows


def _chosen(plan: Plan) -> list[tuple[str, str]]:
    chosen, capacity, fleet, price = plan.chosen, plan.capacity, plan.fleet, plan.price
    wall = plan.wall_seconds
    between = "" if wall.low is None else f" ({clock(wall.low)} to {clock(wall.high or 0.0)})"
    network = plan.network
    shape = "" if network.basis == "checkpoint" else ", its published shape"
    requests = ", ".join(f"{kind} {number:,.0f}" for kind, number in capacity.requests.items())
    rows = [
        ("model", f"{network.name}{shape}, {network.tflop_per_tile:.4g} TFLOP a tile"),
        (
            "replicas",
            f"{fleet.replicas} of {fleet.tensor_parallel}"
            + ("" if fleet.cores is None else f"; {fleet.cores:g} cores"),
        ),
        ("wall time", f"{clock(wall.value)}{between}, {chosen.tiles_per_second:,.1f} tiles/s"),
        ("device-hours", f"{chosen.device_hours:,.2f}"),
        (
            "price",
            f"{_money(price.devices, price.currency)} devices, "
            f"{_money(price.requests, price.currency)} requests, "
            f"{_money(price.storage_per_month, price.currency)} a month for the output "
            f"(list of {price.date})",
        ),
        ("output", f"{_bytes(chosen.output_bytes)} in {capacity.output_objects:,.0f} objects"),
        ("requests", f"{chosen.requests:,.0f} ({requests})"),
        (
            "object store",
            f"{_bytes(capacity.object_store_bytes)} a node, chunks of "
            f"{_bytes(capacity.chunk_bytes)}",
        ),
    ]
    if capacity.cores_per_device is not None:
        has = "" if fleet.cores is None else f"; its machines have {fleet.cores / fleet.count:g}"
        rows.append(("cores a device", f"{capacity.cores_per_device:.1f} are needed{has}"))
    limits = sorted(plan.limits, key=lambda limit: limit.tiles_per_second)
    rows += [
        (
            "limits" if number == 0 else "",
            f"{limit.name} {limit.tiles_per_second:,.1f} tiles/s ({limit.detail})",
        )
        for number, limit in enumerate(limits)
    ]
    return rows


def _rates(plan: Plan) -> list[tuple[str, str]]:
    return [
        (rate.name, f"{rate.value:,.4g} {rate.unit}, {rate.basis}: {rate.source}")
        for rate in plan.rates
    ]


def _comparison(comparison: Comparison, plan: Plan) -> Table:
    table = Table(title=comparison.title, title_justify="left")
    table.add_column("")
    for name in ("tiles", "device-hours", plan.price.currency, "wall time"):
        table.add_column(name, justify="right")
    table.add_column("limit")
    table.add_column("")
    for option in comparison.options:
        table.add_row(*_cells(option), style="bold" if option.chosen else None)
    return table


def _cells(option: Option) -> tuple[str, ...]:
    label = f"{option.label} *" if option.chosen else option.label
    return (
        printable(label),
        "" if option.tiles is None else f"{option.tiles:,.0f}",
        "" if option.device_hours is None else f"{option.device_hours:,.2f}",
        "" if option.price is None else f"{option.price:,.2f}",
        "" if option.wall_seconds is None else clock(option.wall_seconds),
        option.bottleneck or "",
        printable(option.note),
    )


def _grid(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title = title
    table.title_justify = "left"
    for name, value in rows:
        table.add_row(name, printable(value))
    return table


def _interval(interval: Interval, whole: bool) -> str:
    text = f"{interval.value:,.0f}"
    if interval.low is None or interval.high is None:
        return f"{text}, interval unknown"
    if whole and interval.low == interval.high:
        return f"{text}, counted"
    if not interval.value:
        return f"{text} (95 %: {interval.low:,.0f} to {interval.high:,.0f})"
    share = (interval.high - interval.low) / 2 / interval.value
    return f"{text} ± {share:.1%} (95 %: {interval.low:,.0f} to {interval.high:,.0f})"


def _histogram(counts: dict[str, float]) -> str:
    if not counts:
        return "not known"
    return ", ".join(f"{tiles}: {pictures:,.0f}" for tiles, pictures in counts.items())


def _bytes(number: float) -> str:
    return f"{number / GIGA:,.2f} GB" if number >= GIGA else f"{number / 1e6:,.2f} MB"


def _money(amount: float | None, currency: str) -> str:
    return "no price of" if amount is None else f"{amount:,.2f} {currency} for"
