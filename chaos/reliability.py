"""`python -m chaos.reliability`: writes docs/reliability.md from its template and the results.

Rows come from the newest benchmarks/results/<date>-faults-<suite>.json of each suite.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import REPOSITORY, RESULTS, Table
from chaos.results import FaultRow

TEMPLATE = Path(__file__).parent / "reliability.md"
DOCUMENT = REPOSITORY / "docs" / "reliability.md"
MARK = "<!-- faults -->"


def newest(folder: Path) -> list[Path]:
    """One file for each suite, in the order of their names."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*-faults-*.json")):  # names begin with the date
        files[file.stem.partition("-faults-")[2]] = file
    return [files[suite] for suite in sorted(files)]


def rendered(folder: Path = RESULTS) -> str:
    """The document.

    Raises:
        TypeError: a row has other fields than `FaultRow`.
    """
    template = TEMPLATE.read_text()
    assert MARK in template
    parts = []
    for file in newest(folder):
        rows = [FaultRow(**row) for row in json.loads(file.read_text())]
        cells = tuple((r.fault, r.injected, r.happened, r.promised) for r in rows)
        title = f"{rows[0].suite}, from `benchmarks/results/{file.name}`"
        parts.append(
            Table(title, ("fault", "injected", "happened", "promised"), cells).to_markdown()
        )
    return template.replace(MARK, "\n\n".join(parts))


if __name__ == "__main__":
    DOCUMENT.write_text(rendered())
    print(DOCUMENT)
