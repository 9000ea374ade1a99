"""What travels with a job: the code, its files, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from jobs.shipping import pack
from tests.builders import REPOSITORY


def test_code_and_files_and_nothing_else(tmp_path: Path) -> None:
    pack(tmp_path, {"job.yaml": b"x: 1\n"})
    about = f"tessera-{version('tessera')}.dist-info"
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "pipeline", "jobs", about, "job.yaml",
    }  # fmt: skip
    assert (tmp_path / "job.yaml").read_bytes() == b"x: 1\n"
    shipped = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    kinds = {Path(name).suffix for name in shipped}
    assert kinds == {".py", ".yaml", ".css", ".html", ".js", ""}, kinds
    for package in ("model", "pipeline", "jobs"):
        sources = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / package).glob("*.py")}
        assert sources <= shipped
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 4 << 20


def test_it_runs_where_the_project_is_not_installed(tmp_path: Path) -> None:
    """The version comes with the code; `-S` leaves the installed packages out."""
    pack(tmp_path, {})
    code = "import importlib.metadata as m, jobs; print(m.version('tessera'), jobs.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [version("tessera"), str(tmp_path / "jobs" / "__init__.py")]
