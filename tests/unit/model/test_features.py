"""Tokens as they are kept, whole or by InternVL's pixel shuffle; what float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InternVLModel

from model.checkpoint import Checkpoint
from model.encoder import Encoder
from model.errors import UserError
from model.feature_shapes import TOKEN_FEATURES, feature_shape
from model.features import FEATURES, pixel_shuffle
from model.reference import load_reference, reference_embeddings
from model.work import V1_5
from tests.checkpoints import KINDS, random_tiles, tiny_checkpoint, tiny_config


@pytest.mark.parametrize("side", [2, 4, 32])
def test_pixel_shuffle_is_internvls(side: int) -> None:
    patches = torch.arange(2 * side * side * 3, dtype=torch.float32).reshape(2, side * side, 3)
    theirs = InternVLModel.pixel_shuffle(None, patches.reshape(2, side, side, 3), 0.5)
    ours = pixel_shuffle(patches)
    assert torch.equal(ours, theirs.reshape(2, side * side // 4, 12))
    # Of the first token: two patches of the first row, then those below them.
    first = patches[0, [0, 1, side, side + 1]].flatten()
    assert ours[0, 0].tolist() == first.tolist()


def test_shapes_are_those_of_the_published_checkpoints() -> None:
    assert feature_shape("cls", V1_5, 448) == feature_shape("mean", V1_5, 448) == 3200
    assert feature_shape("tokens", V1_5, 448) == (1025, 3200)
    assert feature_shape("tokens-2x2", V1_5, 448) == (256, 12800)
    with pytest.raises(UserError, match="tokens-2x2 needs an even number of patches a side"):
        feature_shape("tokens-2x2", V1_5, 448 + 14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, 0])
def test_tokens_are_those_of_transformers(kind: str, layer: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(kind), seed=2)
    tiles = random_tiles(5, 56)
    encoder = Encoder.load(
        checkpoint, dtype="float32", device="cpu", layer=layer, features=tuple(FEATURES)
    )
    ours = encoder.encode(tiles)
    model = load_reference(checkpoint, "float32", "cpu")
    theirs = reference_embeddings(model, checkpoint, tiles, tuple(FEATURES), layer)
    assert ours["tokens"].shape == (5, 17, 80)
    assert ours["tokens-2x2"].shape == (5, 4, 320)
    for name, values in ours.items():
        shape = feature_shape(name, checkpoint.config, 56)
        assert values.shape[1:] == (shape if isinstance(shape, tuple) else (shape,))
        error = np.linalg.norm(values - theirs[name]) / np.linalg.norm(theirs[name])
        assert error <= 1e-5, name
    assert set(ours) > set(TOKEN_FEATURES)
    np.testing.assert_array_equal(ours["tokens"][:, 0], ours["cls"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path)


def encoder_of(checkpoint: Checkpoint, **options: object) -> Encoder:
    return Encoder.load(
        checkpoint, dtype="float32", device="cpu", features=tuple(FEATURES), **options
    )


def test_float16_is_the_float32_rounded(checkpoint: Checkpoint) -> None:
    tiles = random_tiles(6, 56)
    whole = encoder_of(checkpoint, batch_tiles=4).encode(tiles)
    half = encoder_of(checkpoint, batch_tiles=4, embedding_dtype="float16").encode(tiles)
    for name, values in whole.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(half[name], values.astype(np.float16))


def test_what_float16_cannot_hold_is_told_from_what_is_not_finite(checkpoint: Checkpoint) -> None:
    """A stand-in for the network: tokens with one value of its own in tiles 1, 2 and 3."""
    encoder = encoder_of(checkpoint, batch_tiles=3, embedding_dtype="float16")
    tokens = torch.rand(4, 17, 80)
    tokens[1, 3, 5], tokens[2, 3, 5], tokens[3, 3, 5] = 65_520, torch.inf, torch.nan

    def network(pixels: torch.Tensor) -> torch.Tensor:
        first = round(float(pixels[0, 0, 0, 0] * 0.229 + 0.485) * 255)
        return tokens[first : first + len(pixels)]

    encoder._network = network  # type: ignore[assignment]
    tiles = np.zeros((4, 56, 56, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    for name, values in encoder.encode(tiles).items():
        if name == "cls":
            assert np.isfinite(values).all()
            continue
        rows = values.reshape(4, -1)
        assert np.isnan(rows).any(1).tolist() == [False, False, True, True], name
        overflown = name != "mean"  # a sixteenth of it fits
        assert np.isinf(rows[:2]).any(1).tolist() == [False, overflown], name
