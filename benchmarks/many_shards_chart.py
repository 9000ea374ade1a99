"""Draws the latest result of `benchmarks.bookkeeping_flow`: time and memory over committed shards.

python -m benchmarks.many_shards_chart [--result FILE] [--image FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import REPOSITORY, RESULTS

IMAGE = REPOSITORY / "docs/images/many-shards.svg"
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 240, 64, 44, 110
STYLE = """
  text { font: 13px Helvetica, Arial, sans-serif; fill: #4a5568; }
  .title { font-size: 15px; font-weight: bold; fill: #1d2430; }
  .axis { stroke: #7b8794; fill: none; }
  .line { stroke: #e4572e; stroke-width: 2.5; fill: none; }
  .dot { fill: #e4572e; }
"""
Points = Sequence[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of many shards.")
    newest = max(RESULTS.glob("*-bookkeeping-flow-cpu.json"), default=None)
    parser.add_argument("--result", type=Path, default=newest, help="a result of the benchmark")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where the picture goes")
    options = parser.parse_args()
    if options.result is None:
        parser.error("no result there: run `python -m benchmarks.bookkeeping_flow`")
    rows = json.loads(options.result.read_text())["tables"][1]["rows"]
    largest = max(size for size, *_ in rows)
    samples = [row[1:] for row in rows if row[0] == largest]
    minutes = [(0.0, 0.0), *((done, seconds / 60) for done, seconds, _ in samples)]
    memory = [(done, mib) for done, _, mib in samples]
    options.image.write_text(drawn(minutes, memory))
    print(options.image)


def drawn(minutes: Points, memory: Points) -> str:
    width = 2 * (LEFT + WIDTH) + GAP
    panels = [
        panel(LEFT, "minutes until so many shards are committed", minutes),
        panel(LEFT + WIDTH + GAP, "resident memory of the driver, MiB", memory),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 48}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(panels)}</svg>\n"
    )


def panel(left: int, title: str, points: Points) -> str:
    """A line from zero on both axes, with a dot for each sample."""
    across, up = max(x for x, _ in points), 1.1 * max(y for _, y in points)
    bottom = TOP + HEIGHT
    places = [(left + WIDTH * x / across, bottom - HEIGHT * y / up) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)
    highest = max(y for _, y in points)
    level = bottom - HEIGHT * highest / up
    return (
        f'<text class="title" x="{left}" y="{TOP - 20}">{title}</text>'
        f'<path class="axis" d="M{left},{TOP} V{bottom} H{left + WIDTH}"/>'
        f'<polyline class="line" points="{line}"/>{dots}'
        f'<text x="{left - 8}" y="{level + 4:.1f}" text-anchor="end">{highest:.0f}</text>'
        f'<text x="{left - 8}" y="{bottom + 4}" text-anchor="end">0</text>'
        f'<text x="{left}" y="{bottom + 22}">0</text>'
        f'<text x="{left + WIDTH}" y="{bottom + 22}" text-anchor="end">{across:,.0f} shards</text>'
    )


if __name__ == "__main__":
    main()
