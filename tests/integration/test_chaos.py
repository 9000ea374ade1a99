"""The short version of `make chaos`: real nodes, a real job, a few seeded kills of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.faults import SHORT
from tests.builders import REPOSITORY

KILLS = 5


@pytest.mark.timeout(2700)
def test_seeded_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """In a process of its own: it becomes the parent of all orphans."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "chaos", "--short", "--seed", "1"),
            *("--kills", str(KILLS), "--results", str(tmp_path)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = (json.loads(file.read_text()) for file in tmp_path.glob("*-faults-chaos.json"))
    assert {row["fault"] for row in rows} == set(SHORT)
    assert sum(row["injected"] for row in rows) == KILLS
    assert all("every byte the same" in row["happened"] for row in rows)
