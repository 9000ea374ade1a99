"""What a result file holds: figures, and everything needed to read them or take them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "ray",
    "pillow",
    "pyarrow",
    "numpy",
    "simplejpeg",
    "transformers",
    "webdataset",
)

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_line, self.rows)])


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and command; taken before the measurement, load included."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def write_result(
    what: str,
    device: str,
    about: dict[str, Any],
    tables: Sequence[Table],
    notes: Sequence[str],
    folder: Path,
) -> str:
    """Writes `<date>-<what>-<device>.json` and `.md`; gives the Markdown.

    `about` comes from `machine()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).date().isoformat()
    name = f"{date}-{what}-{device}"
    document = {
        "what": what,
        "date": date,
        "device": device,
        **about,
        "tables": [asdict(table) for table in tables],
        "notes": list(notes),
    }
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    text = "\n".join(
        [
            f"# {what}, {device}, {date}",
            "",
            f"- {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; "
            f"load average before: {about['load_average_before']}",
            f"- {versions}",
            f"- commit {about['commit']}",
            f"- `{about['command']}`",
            "",
            *[f"{table.to_markdown()}\n" for table in tables],
            *[f"- {note}" for note in notes],
            "",
        ]
    )
    (folder / f"{name}.md").write_text(text)
    return text


def _line(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")
