"""One real job over every hostile archive beside good ones: each is committed or named."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.builders import files_below, run_cli, samples, write_checkpoint, write_tar
from tests.hostile.archives import ARCHIVES

GOOD = ("good-a", "good-b")


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """OUTPUT, and what the job said."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "in").mkdir()
    for kind, archive in ARCHIVES.items():
        (folder / "in" / f"{kind}.tar").write_bytes(archive.build())
    for name in GOOD:
        write_tar(folder / "in" / f"{name}.tar", samples(5, prefix=name))
    run = run_cli(
        *("extract", folder / "in", folder / "out", "--json", "--max-reject-rate", "1"),
        *("--model", write_checkpoint(folder / "model"), "--dtype", "float32"),
        *("--image-key", "jpg,png", "--carry", "txt,json:url"),
    )
    return folder / "out", run


def test_sound_shards_are_committed_and_the_others_named(
    job: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, run = job
    assert run.returncode == 1, run.stderr
    failures = json.loads(run.stdout)["failures"]
    expected = {kind for kind, archive in ARCHIVES.items() if archive.failure is not None}
    assert set(failures) == expected
    for kind in expected:
        assert ARCHIVES[kind].failure in failures[kind]
        assert f"shard {kind} is not committed: {failures[kind]}\n" in run.stderr
    commits = {path.stem for path in (output / "commits").iterdir()}
    assert commits == {*GOOD, *ARCHIVES} - expected
    assert "Traceback" not in run.stderr


def test_the_accounts_of_every_committed_shard_balance(
    job: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, _ = job
    files = files_below(output)
    seen = 0
    for path in sorted((output / "commits").iterdir()):
        commit: dict[str, Any] = json.loads(path.read_text())
        rows = pq.read_table(output / f"embeddings/{path.stem}.parquet").to_pylist()
        rejects = f"rejects/{path.stem}.parquet"
        rejected = pq.read_table(output / rejects).to_pylist() if rejects in files else []
        embedded = {row["sample_index"]: row["key"] for row in rows}
        assert not embedded.keys() & {row["sample_index"] for row in rejected}
        assert len(embedded) + len(rejected) == commit["samples"]
        assert len(rejected) == commit["rejects"]
        if path.stem in ARCHIVES:
            archive = ARCHIVES[path.stem]
            assert tuple(embedded.values()) == archive.embedded
            told = [(row["key"], f"{row['stage']}/{row['error']}") for row in rejected]
            assert tuple(told) == archive.rejects
            seen += 1
    assert seen > 25
