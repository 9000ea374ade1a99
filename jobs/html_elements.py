"""HTML by elements: whatever is not an element itself is text, and is escaped.

So a key or a message that a stranger wrote can never become markup, wherever it is put.
"""

from __future__ import annotations

import html

from pipeline.printable import printable

MAX_TEXT = 400  # characters of one text; more of a stranger's message says no more
VOID = frozenset({"br", "img", "meta"})


class Html(str):
    """Markup that was built here."""

    __slots__ = ()


Child = Html | str | int | None


def element(tag: str, *children: Child, **attributes: str | int | None) -> Html:
    """`<tag …>children</tag>`. `class_` gives `class`, `data_tip` gives `data-tip`; an attribute
    or child that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        assert not children, tag
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    return Html("".join(_child(child) for child in children if child is not None))


def text(value: str) -> Html:
    """Text as it may stand between tags and within quoted attributes."""
    return Html(html.escape(printable(value), quote=True))


def cut(value: str) -> str:
    """A stranger's text at a length that can be read."""
    return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}…"


def table(header: tuple[Child, ...], rows: list[tuple[Child, ...]]) -> Html:
    """Scrolls by itself where it is wider than the page."""
    head = element("tr", *(element("th", cell) for cell in header))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, class_="wide")


def _child(child: Child) -> Html:
    return child if isinstance(child, Html) else text(str(child))
