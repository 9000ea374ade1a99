"""model ← pipeline ← jobs, and Ray in a few small modules of the pipeline alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "model": {"pipeline", "jobs", "ray", "fsspec", "s3fs", "webdataset", "pyarrow"},
    "pipeline": {"jobs"},
    "jobs": {"tests", "benchmarks", "chaos"},
}
RAY_IN_PIPELINE = {
    "attempts.py",
    "cpus.py",
    "dataflow.py",
    "index_flow.py",
    "interruption.py",
    "long_runs.py",
    "ray_metrics.py",
    "replica.py",
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def test_ray_is_imported_where_it_is_needed() -> None:
    users = {p.name for p in (ROOT / "pipeline").glob("*.py") if "ray" in imported(p)}
    assert users == RAY_IN_PIPELINE


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    sources = [p for package in FORBIDDEN for p in (ROOT / package).rglob("*.py")]
    for path in sources:
        text = path.read_text()
        assert not imported(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
        assert "trust_remote_code" not in text, path
        assert "torch.load" not in text, path
        assert "yaml.load(" not in text, path
