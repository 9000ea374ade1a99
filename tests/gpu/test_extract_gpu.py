"""The whole job on one GPU: the replica takes it, and transformers agrees with what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builders import run_cli, samples, write_checkpoint, write_tar

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extract_on_a_gpu_verifies_against_transformers(dtype: str, tmp_path: Path) -> None:
    assert torch.cuda.is_available(), "asked for by name, and there is no CUDA device"
    write_tar(tmp_path / "in" / "a.tar", samples(40, seed=1))
    checkpoint = write_checkpoint(tmp_path / "model", image_size=112)
    done = run_cli(
        "extract", tmp_path / "in", tmp_path / "out", "--model", checkpoint, "--dtype", dtype,
        "--tiling", "dynamic", "--features", "cls,mean", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 40
    verified = run_cli("verify", tmp_path / "out", "--recompute", "8", "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert json.loads(verified.stdout)["problems"] == []
