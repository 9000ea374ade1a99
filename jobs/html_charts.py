"""Charts as plain HTML and CSS: no script, nothing to load, readable at any width.

Plotly's own script would make each report 5 MB and would run beside text that strangers wrote;
a picture drawn by matplotlib does not shrink to a phone. These are a few KB, and a page whose
policy forbids scripts altogether shows them. A pointer or a tap on a column tells its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.html_elements import Html, element


@dataclass(frozen=True)
class Bar:
    """`size` is its length in any unit, `value` what is written beside it, `tip` what a pointer
    shows, `kind` its class in the sheet of styles."""

    label: str
    size: float
    value: str = ""
    tip: str = ""
    kind: str = ""


def bars(rows: Sequence[Bar]) -> Html:
    """Bars from left to right, one below the other; the longest is full."""
    longest = _longest(rows)
    lines = []
    for row in rows:
        tap = 0 if row.tip else None
        fill = element("span", class_=_fill(row), style=_percent("width", row, longest))
        lines += [
            element("span", row.label, class_="label", data_tip=row.tip or None, tabindex=tap),
            element("span", fill, class_="track"),
            element("span", row.value, class_="value"),
        ]
    return element("div", *lines, class_="bars")


def columns(rows: Sequence[Bar], low: str, high: str, top: str) -> Html:
    """Columns side by side. `low` and `high` name the ends of the axis, `top` the highest value."""
    longest = _longest(rows)
    cells = [_column(row, longest) for row in rows]
    return _chart(top, element("div", *cells, class_="columns"), low, high)


def named_columns(rows: Sequence[Bar], top: str) -> Html:
    """Columns with a label below each."""
    longest = _longest(rows)
    cells = [_column(row, longest, element("span", row.label, class_="name")) for row in rows]
    return _chart(top, element("div", *cells, class_="columns named"))


def curve(values: Sequence[float], low: str, high: str, top: str) -> Html:
    """A line that rises from left to right over equal steps, its area filled."""
    longest = max(values, default=0) or 1
    step = 100 / max(1, len(values) - 1)
    points = [f"{at * step:.2f},{100 - 100 * y / longest:.2f}" for at, y in enumerate(values)]
    area = element("path", d=f"M0,100 L{' L'.join(points)} L100,100 Z", class_="area")
    line = element("polyline", points=" ".join(points), class_="line")
    shape = element(
        "svg", area, line, viewBox="0 0 100 100", preserveAspectRatio="none", role="img",
        aria_label=top, class_="curve",
    )  # fmt: skip
    return _chart(top, shape, low, high)


def _chart(top: str, shape: Html, low: str | None = None, high: str | None = None) -> Html:
    ends = () if low is None else (element("span", low), element("span", high))
    axis = element("div", *ends, class_="x") if ends else None
    return element("div", element("div", top, class_="top"), shape, axis, class_="chart")


def _column(row: Bar, longest: float, name: Html | None = None) -> Html:
    fill = element("span", class_=_fill(row), style=_percent("height", row, longest))
    return element("span", fill, name, class_="column", data_tip=row.tip, tabindex=0)


def _longest(rows: Sequence[Bar]) -> float:
    return max((row.size for row in rows), default=0) or 1


def _fill(row: Bar) -> str:
    return f"fill {row.kind}".strip()


def _percent(side: str, row: Bar, longest: float) -> str:
    return f"{side}:{100 * row.size / longest:.2f}%"
