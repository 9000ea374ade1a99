"""What `verify` says of an index that is not what its record or OUTPUT says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.index import build_index
from jobs.verify_index import verify_index
from pipeline.commits import Commit
from pipeline.index_record import RECORD
from tests.builders import run_cli
from tests.stages import STORAGE
from tests.vector_outputs import clustered, drop_shard, put_shard, sweep, vector_dataset

DATASET = vector_dataset({"cls": 16})


def put(root: Path, name: str, seed: int, before: Commit | None = None) -> Commit:
    values = {"cls": clustered(30, 16, seed)}
    return put_shard(str(root / "out"), DATASET, name, values, STORAGE, before=before)


@pytest.fixture
def commits(tmp_path: Path) -> dict[str, Commit]:
    made = {name: put(tmp_path, name, seed) for seed, name in enumerate("abc")}
    build_index(str(tmp_path / "out"), str(tmp_path / "index"), kind="ivf-pq")
    return made


def problems(root: Path) -> list[str]:
    return list(verify_index(str(root / "index")).problems)


def only(root: Path, pattern: str) -> Path:
    (found,) = (root / "index").glob(pattern)
    return found


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "index" / RECORD
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_fresh_index_is_whole(tmp_path: Path, commits: dict[str, Commit]) -> None:
    report = verify_index(str(tmp_path / "index"))
    assert report.problems == ()
    assert (report.segments, report.shards, report.vectors) == (1, 3, 90)
    assert report.output == str(tmp_path / "out")


AGAIN = "run `tessera index` again"
REPAIR = f"remove it and {AGAIN}"
FILES = (
    "segments/*.faiss",
    f"segments/{'?' * 64}.parquet",
    "segments/*.nearest.parquet",
    "segments/*.found.parquet",
    "models/*.faiss",
    "models/*.queries.*",
)


@pytest.mark.parametrize("pattern", FILES)
def test_files_that_are_gone_cut_or_changed(
    tmp_path: Path, commits: dict[str, Commit], pattern: str
) -> None:
    file = only(tmp_path, pattern)
    name, data = str(file.relative_to(tmp_path / "index")), file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    differs = "its bytes are not those of the record (sha256 differs)"
    assert f"{name}: {differs}; {REPAIR}" in problems(tmp_path)
    file.write_bytes(data[:-1])
    assert problems(tmp_path) == [
        f"{file}: {len(data) - 1} bytes, the record says {len(data)}; {REPAIR}"
    ]
    file.unlink()
    assert problems(tmp_path) == [f"{name}: missing; {AGAIN}"]


@pytest.mark.parametrize("pattern", [*FILES, "segments/*.json", "models/*.json"])
@pytest.mark.parametrize("dead", [False, True])
def test_the_advice_helps(
    tmp_path: Path, commits: dict[str, Commit], pattern: str, dead: bool
) -> None:
    """What is removed is made again, also of a segment that is not all live any more."""
    if dead:
        drop_shard(str(tmp_path / "out"), commits["a"], STORAGE)
        build_index(str(tmp_path / "out"), str(tmp_path / "index"))
    file = only(tmp_path, pattern)
    name, data = str(file.relative_to(tmp_path / "index")), file.read_bytes()
    if file.suffix != ".json":
        file.write_bytes(b"x" * len(data))
        assert any(line.startswith(name) and line.endswith(REPAIR) for line in problems(tmp_path))
    file.unlink()
    assert problems(tmp_path) == [f"{name}: missing; {AGAIN}"]
    build_index(str(tmp_path / "out"), str(tmp_path / "index"))
    assert problems(tmp_path) == []
    if not dead:
        assert file.read_bytes() == data


def test_shards_that_are_not_as_committed(tmp_path: Path, commits: dict[str, Commit]) -> None:
    drop_shard(str(tmp_path / "out"), commits["a"], STORAGE)
    put(tmp_path, "b", 9, before=commits["b"])
    sweep(str(tmp_path / "out"), commits["b"], STORAGE)
    put(tmp_path, "d", 4)
    assert problems(tmp_path) == [
        "shard d: committed, not in the index; run `tessera index` again",
        "shard a: in the index, not committed any more",
        "shard b: its commit has changed since it was indexed",
    ]
    build_index(str(tmp_path / "out"), str(tmp_path / "index"), kind="ivf-pq")
    assert problems(tmp_path) == []


def test_a_record_that_does_not_fit(tmp_path: Path, commits: dict[str, Commit]) -> None:
    segment = only(tmp_path, "segments/*.faiss").stem

    def shift(record: dict[str, Any]) -> None:
        record["segments"][0]["shards"][1]["start"] = 29

    edit(tmp_path, shift)
    assert problems(tmp_path) == [
        f"{RECORD}: shard b begins at 29, 30 is due",
        f"segments/{segment}.parquet: rows of shard b are of another",
    ]

    def resize(record: dict[str, Any]) -> None:
        record["segments"][0]["shards"][1] |= {"start": 30, "count": 31}
        record["fingerprint"] = "0" * 64

    edit(tmp_path, resize)
    found = problems(tmp_path)
    assert f"segments/{segment}.faiss: 90 vectors of 16, the record says 91 of 16" in found
    assert f"segments/{segment}.parquet: 90 rows, the record says 91" in found
    assert "shard b: 31 vectors, its commit has 30 pictures" in found
    assert any(p.startswith(f"{RECORD}: of fingerprint 000000000000") for p in found)


def test_what_belongs_to_nothing(tmp_path: Path, commits: dict[str, Commit]) -> None:
    (tmp_path / "index/segments/left.faiss").write_bytes(b"x")
    only(tmp_path, "models/*.json").unlink()
    model, left = problems(tmp_path)
    assert (model.startswith("models/"), model.endswith(f".json: missing; {AGAIN}")) == (True, True)
    assert left == "segments/left.faiss: belongs to nothing; run `tessera index` again"


def test_the_command_takes_an_index(tmp_path: Path, commits: dict[str, Commit]) -> None:
    index = tmp_path / "index"
    done = run_cli("verify", index, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["whole"]
    only(tmp_path, "segments/*.faiss").unlink()
    broken = run_cli("verify", index)
    assert broken.returncode == 1
    assert ".faiss: missing" in broken.stdout
    refused = run_cli("verify", index, "--recompute", "1")
    assert refused.returncode == 2
    assert "--input, --recompute and --model are for an OUTPUT" in refused.stderr
