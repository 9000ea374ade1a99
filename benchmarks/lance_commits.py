"""What does a commit cost in a Lance dataset of many fragments, one a shard?

pylance is no dependency of this project, and goes to a folder of its own:

pip install --no-deps --target FOLDER pylance==14.0.2 lance-namespace==0.13.0
PYTHONPATH=FOLDER python -m benchmarks.lance_commits [--fragments 1000,5000] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import write_fragments

from benchmarks.record import RESULTS, Cell, Table, machine, write_result

ROWS, WIDTH = 4, 8
COMMITS = 5  # of one fragment each, at each size


def table(seed: int) -> pa.Table:
    values = np.random.default_rng(seed).random(ROWS * WIDTH, np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)
    return pa.table({"key": [f"{seed}-{row}" for row in range(ROWS)], "cls": vectors})


def below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, count: int) -> tuple[Cell, ...]:
    """A dataset that gets `count` fragments at once, and then a few more one by one."""
    place = str(folder / f"{count}.lance")
    lance.write_dataset(table(0), place)
    began = time.perf_counter()
    fragments = [f for n in range(1, count) for f in write_fragments(table(n), place)]
    writing = time.perf_counter() - began
    version = lance.dataset(place).version
    operation = lance.LanceOperation.Append(fragments)
    dataset = lance.LanceDataset.commit(place, operation, read_version=version)
    seconds, grown = [], []
    for n in range(COMMITS):
        fragment = write_fragments(table(count + n), place)
        before = below(Path(place))
        began = time.perf_counter()
        dataset = lance.LanceDataset.commit(
            place, lance.LanceOperation.Append(fragment), read_version=dataset.version
        )
        seconds.append(time.perf_counter() - began)
        grown.append(below(Path(place)) - before)
    began = time.perf_counter()
    opened = lance.dataset(place)
    opening = time.perf_counter() - began
    assert opened.count_rows() == (count + COMMITS) * ROWS
    return (
        len(opened.get_fragments()),
        round(1000 * statistics.median(seconds), 1),
        round(statistics.median(grown) / 1000, 1),
        round(1000 * opening, 1),
        round(1000 * writing / (count - 1), 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fragments", default="1000,5000")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), int(count)) for count in options.fragments.split(",")]
    columns = (
        "fragments",
        "ms a commit",
        "kB written by a commit",
        "ms to open it",
        "ms to write a fragment",
    )
    table = Table("A dataset that gets fragments one by one", columns, tuple(rows))
    notes = [
        f"pylance {lance.__version__}; fragments of {ROWS} vectors of {WIDTH}, on the local disk",
        f"medians of {COMMITS} commits of one fragment each; 1 kB = 10^3 bytes",
    ]
    print(write_result("lance-commits", "cpu", about, [table], notes, options.results))


if __name__ == "__main__":
    main()
