"""What a result file holds: figures, and everything needed to read them or take them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
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
    """Hardware, versions, commit and command; taken before the measurement, load included.

    `gpu` is None where torch finds none; the version of a package that is not installed is None.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "system": platform.platform(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
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
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items() if value)
    text = "\n".join(
        [
            f"# {what}, {device}, {date}",
            "",
            f"- {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; "
            f"load average before: {about['load_average_before']}",
            *_gpu_line(about["gpu"]),
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


def _gpu() -> dict[str, Any] | None:
    import torch  # here, because not every benchmark has need of it

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _driver() -> str | None:
    """NVIDIA's driver version; None where there is no nvidia-smi, or it does not know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 else None


def _gpu_line(gpu: dict[str, Any] | None) -> list[str]:
    if gpu is None:
        return []
    return [
        f"- {gpu['count']} x {gpu['name']}, {gpu['memory_gib']} GiB; driver {gpu['driver']}, "
        f"CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the working tree; says so where there is no git or no repository."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown: not in a git repository"
