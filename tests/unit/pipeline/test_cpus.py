"""Cores are counted as a container gives them, not as the machine has them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from ray._private import utils

from pipeline.cpus import usable_cpus


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"),
    [(64, "max 100000", 64), (64, "200000 100000", 2), (3, "800000 100000", 3), (8, "5 100000", 1)],
)
def test_the_smaller_of_affinity_and_quota(
    affinity: int, quota: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    nowhere, count = str(tmp_path / "none"), utils._get_docker_cpus
    monkeypatch.setattr(
        utils, "_get_docker_cpus", lambda: count(nowhere, nowhere, nowhere, f"{tmp_path}/cpu.max")
    )
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.delenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", raising=False)
    assert usable_cpus() == usable
