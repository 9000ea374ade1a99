"""A run on the cores, planned and run: the processes that measure it are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import cpu_rate
from jobs import plan as planning
from jobs.plan_document import Plan
from jobs.plan_options import load_plan_config
from model.errors import UserError
from tests.builders import write_checkpoint
from tests.planning import write_input


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_input(folder / "in", num_shards=3)
    write_checkpoint(folder / "ckpt")
    return folder


def planned(root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Plan:
    monkeypatch.setattr(cpu_rate, "TURNS", 1)
    monkeypatch.setattr(cpu_rate, "TURN_SECONDS", 0.3)
    given = {"input": (str(root / "in"),), "model": str(root / "ckpt"), **options}
    return planning.plan(load_plan_config(None, given), frozenset(options))


def test_two_replicas_beside_tiling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(root, monkeypatch, fleet=("cpu", "8xL4"), replicas="2", tiling="dynamic")
    rates = {rate.name: rate for rate in found.rates}
    alone, beside = rates["encoder alone"].value, rates["encoder beside tiling"].value
    assert beside > 0
    assert alone > 0
    assert rates["encoder alone"].basis == "measured"
    assert "2 replicas" in rates["encoder alone"].source
    assert found.fleet.replicas == 2
    tiles = found.chosen.tiles
    assert found.chosen.wall_seconds > tiles / rates["both, sharing the cores"].value
    assert found.chosen.tiles_per_second == pytest.approx(tiles / found.chosen.wall_seconds)
    (fleets,) = [table for table in found.comparisons if table.title == "fleet"]
    assert [option.label for option in fleets.options][:2] == ["cpu", "8xL4"]


def test_a_checkpoint_that_cannot_be_loaded_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"cannot measure encode here: .*attention") as told:
        planned(root, monkeypatch, attention="flash-attn-3")
    assert "\n" not in str(told.value)
