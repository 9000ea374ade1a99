"""Tensor-parallel ranks as real processes on gloo: they agree with one, and fail as one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from model import ranks
from model.checkpoint import open_checkpoint
from model.config import Layout
from model.encoder import Encoder
from model.errors import UserError
from model.features import FEATURES
from model.pulse import Stillness
from model.random_checkpoint import write_random_checkpoint
from model.ranks import EXIT_RANKS_FAILED, ParallelEncoder
from tests.builders import REPOSITORY
from tests.checkpoints import tiny_config
from tests.running import still_alive

HANG_SECONDS = 5.0


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "layout", "size"),
    [
        ("rms_norm", "remote-code", 2),
        ("rms_norm", "transformers", 3),
        ("rms_norm", "internvl", 5),
        ("layer_norm", "transformers", 2),
        ("layer_norm", "internvl", 3),
        ("layer_norm", "remote-code", 5),
    ],
)
def test_ranks_agree_with_one(kind: str, layout: Layout, size: int, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config(kind, 56), seed=1, layout=layout)
    checkpoint = open_checkpoint(str(tmp_path))
    tiles = np.random.default_rng(size).integers(0, 256, (7, 56, 56, 3), dtype=np.uint8)
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu", "features": tuple(FEATURES)}
    expected = Encoder.load(checkpoint, **how).encode(tiles)
    encoder = ParallelEncoder(checkpoint, size, batch_tiles=3, **how)
    try:
        assert len(encoder.pids) == size - 1
        few = encoder.encode(tiles[:2])  # shared memory grows with the next call
        found = encoder.encode(tiles)
        none = encoder.encode(tiles[:0])
        with pytest.raises(ValueError, match="expected uint8"):
            encoder.encode(tiles[:1].astype(np.float32))
        again = encoder.encode(tiles)  # the refusal left the ranks in step
    finally:
        encoder.close()
    for feature, values in expected.items():
        assert relative_error(found[feature], values) <= 1e-5
        assert relative_error(few[feature], values[:2]) <= 1e-5
        assert none[feature].shape == (0, *values.shape[1:])
        np.testing.assert_array_equal(again[feature], found[feature])
    assert not any(map(psutil.pid_exists, encoder.pids))


def test_what_one_encoder_refuses_ranks_refuse_and_leave_no_process(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config("rms_norm", 56), seed=1)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="tensor_parallel: 6; the checkpoint has 5 heads"):
        ParallelEncoder(checkpoint, 6, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="features"):
        ParallelEncoder(checkpoint, 2, dtype="float32", device="cpu", features=("max",))
    assert not [c for c in psutil.Process().children() if is_rank(c)]


def is_rank(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "model.ranks" in process.cmdline()
    return False


@contextmanager
def rank_zero(
    folder: Path, size: int, how_long: str = "on"
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that embeds without end, and the other ranks' process ids."""
    write_random_checkpoint(folder, tiny_config("rms_norm", 56), seed=1)
    arguments = [str(folder), str(size), str(HANG_SECONDS), how_long]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.model.rank_process", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert process.stdout.readline() == "embedded\n"
        yield process, pids
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("rank", "signum"),
    [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGKILL), (2, signal.SIGSTOP)],
)
def test_ranks_end_as_one(rank: int, signum: signal.Signals, tmp_path: Path) -> None:
    with rank_zero(tmp_path, 3) as (process, pids):
        others = [psutil.Process(pid) for pid in pids]
        os.kill([process.pid, *pids][rank], signum)
        process.stdout.close()  # type: ignore[union-attr]
        _, stderr = process.communicate(timeout=240)
        assert not still_alive(others), "a rank is left behind"
    if rank == 0:  # killed, or stopped and then killed by another rank
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == EXIT_RANKS_FAILED, stderr
        said = (
            f"rank {rank} ended" if signum == signal.SIGKILL else f"rank {rank} has stopped|no rank"
        )
        assert re.search(said, stderr)


def test_a_rank_that_stops_between_two_calls_is_noticed(tmp_path: Path) -> None:
    """Rank 0 has nothing to do for the others: only their watching threads can tell."""
    for rank in (0, 1):
        with rank_zero(tmp_path, 2, "once") as (process, pids):
            others = [psutil.Process(pid) for pid in pids]
            os.kill([process.pid, *pids][rank], signal.SIGSTOP)
            process.stdout.close()  # type: ignore[union-attr]
            _, stderr = process.communicate(timeout=240)
            assert not still_alive(others), "a rank is left behind"
        expected = -signal.SIGKILL if rank == 0 else EXIT_RANKS_FAILED
        assert process.returncode == expected, stderr
        if rank:
            assert "rank 1 has stopped; all of them end" in stderr


def test_a_rank_killed_while_it_loads_ends_the_process(tmp_path: Path) -> None:
    """An exception would end the whole job; Ray starts a replica again whose process ended."""
    write_random_checkpoint(tmp_path, tiny_config("rms_norm", 56), seed=1)
    arguments = [str(tmp_path), "2", str(HANG_SECONDS), "loading"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.rank_process", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == EXIT_RANKS_FAILED, run.stderr
    assert "rank 1 ended with status -9; all of them end" in run.stderr


def test_ranks_that_have_not_begun_are_not_still(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 100.0
    monkeypatch.setattr(ranks.time, "monotonic", lambda: moment)
    rounds = np.array([3, 0, 7], np.uint64)
    stillness = Stillness(rounds)
    moment += 5
    rounds[2] += 1
    assert stillness.longer_than(4.0) == [0]
    assert stillness.longer_than(6.0) == []
    moment += 5
    assert stillness.longer_than(4.0) == [0, 2]


def test_what_a_rank_prints_has_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    with rank_zero(tmp_path, 2) as (process, pids):
        os.kill(pids[0], signal.SIGABRT)
        process.stdout.close()  # type: ignore[union-attr]
        _, stderr = process.communicate(timeout=240)
    assert "rank 1: Fatal Python error: Aborted\n" in stderr
    assert "rank 1 ended with status -6; all of them end" in stderr
