"""The encoder on a CUDA device against transformers on the same device and on the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.encoder import Encoder
from model.ranks import ParallelEncoder
from model.reference import load_reference, reference_embeddings
from tests.checkpoints import KINDS, random_tiles, tiny_checkpoint, tiny_config
from tests.unit.model.test_encoder import lowest_cosine, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda() -> None:
    assert torch.cuda.is_available(), "the GPU tests were asked for, and torch finds no CUDA device"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, 0])
def test_float32_on_the_gpu(kind: str, layer: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(kind, image_size=448))
    tiles = random_tiles(5, 448)
    ours = Encoder.load(
        checkpoint, dtype="float32", device="cuda", layer=layer, batch_tiles=2
    ).encode(tiles)
    for device in ("cuda", "cpu"):
        torch.backends.cudnn.allow_tf32 = False  # transformers' patch embedding convolves
        model = load_reference(checkpoint, "float32", device)
        theirs = reference_embeddings(model, checkpoint, tiles, ("cls", "mean"), layer)
        for feature in ("cls", "mean"):
            assert ours[feature].shape == (5, 80)
            assert relative_error(ours[feature], theirs[feature]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_the_gpu(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(kind, image_size=448))
    tiles = random_tiles(5, 448)
    ours = Encoder.load(checkpoint, dtype="bfloat16", device="cuda").encode(tiles)
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        model = load_reference(checkpoint, dtype, device)
        theirs = reference_embeddings(model, checkpoint, tiles, ("cls", "mean"))
        for feature in ("cls", "mean"):
            assert lowest_cosine(ours[feature], theirs[feature]) >= 0.9995


def test_micro_batches_keep_their_order(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    tiles = random_tiles(50, 56)
    tiles.flags.writeable = False
    on_cpu = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    # Small batches one after the other: a staging buffer used again too early would show here.
    on_gpu = Encoder.load(checkpoint, dtype="float32", device="cuda", batch_tiles=3).encode(tiles)
    for feature in ("cls", "mean"):
        assert relative_error(on_gpu[feature], on_cpu[feature]) <= 1e-5
        assert np.linalg.norm(on_gpu[feature] - on_gpu[feature][::-1]) > 1


def test_the_device_holds_one_copy(tmp_path: Path) -> None:
    config = tiny_config(num_layers=30)
    checkpoint = tiny_checkpoint(tmp_path, config)
    size = checkpoint.files[0].stat().st_size
    _ = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # cuBLAS's workspace
    before = torch.cuda.memory_allocated()
    encoder = Encoder.load(checkpoint, dtype="float32", device="cuda")
    held = torch.cuda.memory_allocated() - before
    assert 1 <= encoder.batch_tiles <= 128
    assert 0.95 * size < held < 1.3 * size  # small tensors are rounded up to 512 bytes


def test_a_batch_is_found_within_half_a_minute(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config("rms_norm", image_size=448))
    encoder = Encoder.load(checkpoint, dtype="bfloat16", device="cuda", batch_tiles=2)
    began = time.perf_counter()
    found = encoder._find_batch()
    assert time.perf_counter() - began <= 30
    assert 1 <= found <= 128


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_on_the_gpu(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(kind, image_size=448))
    tiles = random_tiles(3, 448)
    ours = Encoder.load(checkpoint, dtype="fp8", device="cuda").encode(tiles)
    theirs = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    for feature in ("cls", "mean"):
        assert lowest_cosine(ours[feature], theirs[feature]) >= 0.999


def test_two_ranks_on_two_gpus(tmp_path: Path) -> None:
    assert torch.cuda.device_count() > 1, "this test needs two CUDA devices"
    checkpoint = tiny_checkpoint(tmp_path, tiny_config("rms_norm", image_size=448))
    tiles = random_tiles(5, 448)
    expected = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    encoder = ParallelEncoder(checkpoint, 2, dtype="float32", device="cuda")
    try:
        found = encoder.encode(tiles)
    finally:
        encoder.close()
    for feature in ("cls", "mean"):
        assert relative_error(found[feature], expected[feature]) <= 1e-5
