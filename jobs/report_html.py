"""The report's page: one file that loads nothing and runs nothing.

Its policy forbids scripts and every address but pictures within the page itself, so that what
strangers wrote into keys and messages could do nothing even if it were not escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

from pydantic import ByteSize

from jobs.html_charts import Bar, bars, columns, curve, named_columns
from jobs.html_elements import Child, Html, cut, element, join, table
from jobs.report_examples import Example, Examples
from jobs.report_figures import STAGES, Figures, ReplicaFigures
from jobs.report_plan import Comparison
from jobs.report_sizes import EDGES, Sizes
from jobs.report_time import Timeline
from jobs.terminal import clock
from pipeline.commits import Dataset, Failure
from pipeline.records import shown_shape
from pipeline.storage import redact

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SHOWN_REPLICAS = 20  # at each end
SHOWN_FAILURES = 50


@dataclass(frozen=True)
class Report:
    """Everything a page shows. `state` says how far the run is, `failures` are the last run's."""

    output: str
    made_at: datetime
    dataset: Dataset
    state: str
    failures: Sequence[Failure]
    figures: Figures
    timeline: Timeline | None
    sizes: Sizes
    examples: Examples
    planned: Sequence[Comparison]
    planned_tiles: Mapping[int, float]

    @property
    def active_seconds(self) -> float | None:
        return None if self.timeline is None else self.timeline.active_seconds


def page(report: Report) -> str:
    """The whole document."""
    title = f"tessera: {redact(report.output)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(files("jobs").joinpath("report.css").read_text())),
    )
    sections = [
        _head(report),
        _cards(report),
        _failures(report),
        _progress(report.timeline),
        _replicas(report.figures),
        _stages(report.figures),
        _tiles(report),
        _sizes(report),
        _rejects(report),
        _slowest(report.figures),
        _plan(report.planned),
    ]
    body = element("body", *sections)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _head(report: Report) -> Html:
    dataset = report.dataset
    revision = f" @ {dataset.revision[:12]}" if dataset.revision else ""
    features = ", ".join(f"{name} {shown_shape(shape)}" for name, shape in dataset.features.items())
    return join(
        element("h1", redact(report.output)),
        element(
            "p",
            f"{dataset.model}{revision}, {dataset.settings['tiling']}, {features}, fingerprint "
            f"{dataset.fingerprint[:12]}. {report.state} Made {report.made_at:%Y-%m-%d %H:%M} UTC.",
            class_="note",
        ),
    )


def _cards(report: Report) -> Html:
    figures, active = report.figures, report.active_seconds
    rejected = _share(figures.rejects, figures.samples)
    cards = [
        (f"{figures.shards:,}", "shards committed"),
        (f"{figures.pictures:,}", "pictures"),
        (f"{figures.tiles:,}", "tiles"),
        (f"{figures.rejects:,}", f"rejects ({rejected})"),
        (f"{figures.tiles / active:,.1f}" if active else "?", "tiles/s while shards came"),
        (clock(active) if active else "?", "time in which shards came"),
        (_bytes(figures.source_bytes), "read"),
        (_bytes(figures.output_bytes), "written"),
    ]
    shown = [element("div", element("b", b), element("span", s), class_="card") for b, s in cards]
    return element("div", *shown, class_="cards")


def _failures(report: Report) -> Html | None:
    if not report.failures:
        return None
    rows: list[tuple[Child, ...]] = [
        (cut(failure.shard), cut(failure.reason)) for failure in report.failures[:SHOWN_FAILURES]
    ]
    more = len(report.failures) - len(rows)
    return _section(
        "Shards that failed in the last run",
        f"The next run tries them again.{f' {more} more are not shown.' if more else ''}",
        table(("shard", "reason"), rows),
    )


def _progress(timeline: Timeline | None) -> Html:
    if timeline is None:
        return _section("Progress over time", "Nothing is committed yet.")
    low, high = timeline.label(0), timeline.label(len(timeline.rates))
    highest = max(timeline.rates)
    rates = [
        Bar("", rate, "", f"{timeline.label(at)}: {rate:,.1f} tiles/s")
        for at, rate in enumerate(timeline.rates)
    ]
    pauses = timeline.pauses
    note = f"By the time of each commit, in steps of {clock(timeline.step)}; a shard's tiles count "
    note += "at once when it is committed."
    if pauses:
        note += f" {pauses} pauses are left out of the time in which shards came."
    return _section(
        "Progress over time",
        note,
        columns(rates, low, high, f"tiles/s, at most {highest:,.1f}"),
        curve(
            [0, *timeline.totals], low, high, f"tiles in all, {timeline.totals[-1]:,} at the end"
        ),
    )


def _replicas(figures: Figures) -> Html:
    ordered = sorted(figures.replicas.items(), key=lambda item: item[1].rate)
    note = "While it computed: waiting for tiles is not counted. "
    note += "A replica that starts again counts as another. "
    note += f"Shards by device: {_counts(figures.devices)}."
    if not ordered:
        return _section("Tiles/s of each replica", "These commits do not tell who embedded them.")
    shown = ordered
    if len(ordered) > 2 * SHOWN_REPLICAS:
        shown = [*ordered[:SHOWN_REPLICAS], *ordered[-SHOWN_REPLICAS:]]
        note += f" The {SHOWN_REPLICAS} slowest and the {SHOWN_REPLICAS} fastest of {len(ordered)}."
    rows = [_replica_bar(node, name, replica) for (node, name), replica in shown]
    return _section("Tiles/s of each replica", note, bars(rows))


def _replica_bar(node: str, name: str, replica: ReplicaFigures) -> Bar:
    tip = f"{replica.tiles:,} tiles in {clock(replica.seconds)}"
    return Bar(f"{node} {name}", replica.rate, f"{replica.rate:,.1f}", tip)


def _stages(figures: Figures) -> Html:
    total = sum(figures.seconds.values())
    rows = [
        Bar(stage, spent, f"{_share(spent, total)}, {clock(spent)}", kind=stage)
        for stage, spent in ((stage, figures.seconds[stage]) for stage in STAGES)
    ]
    return _section(
        "Where time went",
        "Work of all tasks together, not time on a clock: stages run side by side, embed on the "
        "replicas, the others on CPUs.",
        bars(rows),
    )


def _tiles(report: Report) -> Html:
    figures, planned = report.figures, report.planned_tiles
    if not figures.tile_counts:
        return _section("Tiles of a picture", "These commits do not tell it.")
    pictures = figures.tile_counts.total()
    due = sum(planned.values())
    rows = []
    for count in sorted({*figures.tile_counts, *planned}):
        found = figures.tile_counts[count]
        tip = f"{count} tiles: {found:,} pictures, {_share(found, pictures)}"
        if due:
            tip += f"; planned {_share(planned.get(count, 0), due)}"
        rows.append(Bar(str(count), found, "", tip))
    highest = max(figures.tile_counts.values())
    note = f"The thumbnail counts as a tile. {pictures:,} pictures, "
    note += f"{figures.tiles / max(1, figures.pictures):.2f} tiles each on average."
    if figures.untold:
        note += f" {figures.untold} shards of an earlier version do not tell."
    top = f"pictures, at most {highest:,}"
    return _section("Tiles of a picture", note, named_columns(rows, top))


def _sizes(report: Report) -> Html:
    sizes, figures = report.sizes, report.figures
    if not sizes.pictures:
        why = f" ({cut(sizes.problem)})" if sizes.problem else ""
        return _section("Size of pictures", f"No part could be looked into{why}.")
    shown = [at for at, count in enumerate(sizes.counts) if count]
    rows = []
    for at in range(shown[0], shown[-1] + 1):
        end = f"to {EDGES[at + 1] - 1}" if at + 1 < len(EDGES) else "and more"
        count = sizes.counts[at]
        tip = f"{EDGES[at]} {end} pixels: {count:,} pictures, {_share(count, sizes.pictures)}"
        rows.append(Bar(str(EDGES[at]), count, "", tip))
    note = "The longer side in pixels, from the number below each column on. A sample: "
    note += f"{sizes.pictures:,} pictures, the first row group of {sizes.parts} of "
    note += f"{figures.num_parts:,} parts, drawn by chance."
    if sizes.failed:
        note += f" {sizes.failed} could not be read, the last: {cut(sizes.problem or '')}."
    top = f"pictures, at most {max(sizes.counts):,}"
    return _section("Size of pictures", note, named_columns(rows, top))


def _rejects(report: Report) -> Html:
    figures = report.figures
    if not figures.rejects:
        return _section("Rejects", "None.")
    rows = [
        Bar(code, count, f"{count:,} ({_share(count, figures.samples)})", kind="bad")
        for code, count in figures.reject_codes.most_common()
    ]
    told = figures.reject_codes.total()
    note = f"{figures.rejects:,} of {figures.samples:,} samples, by stage and code."
    if told < figures.rejects:
        note += f" {figures.rejects - told:,} are in commits of an earlier version without codes."
    parts: list[Child] = [bars(rows)]
    for code, examples in report.examples.by_code.items():
        if examples:
            shown = [_example(example) for example in examples]
            parts += [element("h3", code), element("div", *shown, class_="examples")]
    parts += [element("p", cut(problem), class_="note") for problem in report.examples.notes]
    return _section("Rejects", note, *parts)


def _example(example: Example) -> Html:
    reject = example.reject
    if example.picture is not None:
        data = base64.b64encode(example.picture).decode()
        shown = element("img", src=f"data:image/jpeg;base64,{data}", alt="")
    else:
        shown = element("span", cut(example.note))
    return element(
        "div",
        element("div", shown, class_="shown"),
        element(
            "div", element("b", cut(reject.key)), element("br"), cut(reject.message),
            element("div", f"{example.shard}, sample {reject.sample_index}", class_="note"),
            class_="told",
        ),
        class_="example",
    )  # fmt: skip


def _slowest(figures: Figures) -> Html:
    rows: list[tuple[Child, ...]] = []
    for slow in figures.slowest:
        each = f"{slow.total / slow.tiles:.3f}" if slow.tiles else "-"
        seconds = [f"{spent:,.1f}" for spent in slow.seconds]
        counts = [f"{slow.samples:,}", f"{slow.tiles:,}", f"{slow.rejects:,}"]
        size = _bytes(slow.source_bytes)
        rows.append((slow.name, f"{slow.total:,.1f}", *seconds, each, *counts, size))
    header = ("shard", "seconds", *STAGES, "a tile", "samples", "tiles", "rejects", "size")
    note = "By seconds of work in all stages together."
    return _section("Slowest shards", note, table(header, rows))


def _plan(planned: Sequence[Comparison]) -> Html | None:
    if not planned:
        return None
    rows: list[tuple[Child, ...]] = []
    for row in planned:
        due = "" if row.due is None else _amount(row.due, row.unit)
        actual = "not told" if row.actual is None else _amount(row.actual, row.unit)
        difference = "" if row.difference is None else f"{100 * row.difference:+.1f} %"
        rows.append((row.name, _amount(row.planned, row.unit), due, actual, difference))
    header = ("", "planned", "for what is done", "actual", "difference")
    note = "“For what is done” is the plan's share for the pictures that are committed by now."
    return _section("Plan and actual", note, table(header, rows))


def _section(title: str, note: str, *children: Child) -> Html:
    return element("section", element("h2", title), element("p", note, class_="note"), *children)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _bytes(count: float) -> str:
    return ByteSize(round(count)).human_readable(separator=" ")


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return _bytes(value)
    if unit == "s":
        return clock(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{name}: {times:,}" for name, times in sorted(counts.items())) or "not told"
