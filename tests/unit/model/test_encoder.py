"""The encoder against transformers' own model, and what it promises beside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch._dynamo.utils import counters

from model.checkpoint import Checkpoint, open_checkpoint, write_random_checkpoint
from model.config import Layout, count_blocks
from model.encoder import FEATURES, Encoder
from model.errors import UserError
from model.float8 import Float8Linear
from model.group import Group
from model.reference import load_reference, reference_embeddings
from tests.checkpoints import KINDS, random_tiles, tiny_checkpoint, tiny_config

Embeddings = npt.NDArray[np.float32]


def relative_error(ours: Embeddings, theirs: Embeddings) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def lowest_cosine(ours: Embeddings, theirs: Embeddings) -> float:
    dot = (ours * theirs).sum(1)
    return float((dot / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)).min())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """One of each kind, 56-pixel tiles."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny_checkpoint(folder / kind, tiny_config(kind), seed=3) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_448_pixel_tiles_embed_as_transformers_does(kind: str, dtype: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(kind, image_size=448))
    tiles = random_tiles(2, 448)
    ours = Encoder.load(checkpoint, dtype=dtype, device="cpu").encode(tiles)
    theirs = reference_embeddings(
        load_reference(checkpoint, "float32", "cpu"), checkpoint, tiles, ("cls", "mean")
    )
    assert set(ours) == {"cls", "mean"}
    for feature, embeddings in ours.items():
        assert embeddings.shape == (2, 80)
        assert embeddings.dtype == np.float32
        if dtype == "float32":
            assert relative_error(embeddings, theirs[feature]) <= 1e-5
        else:
            assert lowest_cosine(embeddings, theirs[feature]) >= 0.9995
            assert relative_error(embeddings, theirs[feature]) > 1e-5  # was it bfloat16 at all?


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_transformers_bfloat16(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, tiles = checkpoints[kind], random_tiles(5, 56)
    ours = Encoder.load(checkpoint, dtype="bfloat16", device="cpu").encode(tiles)
    model = load_reference(checkpoint, "bfloat16", "cpu")
    theirs = reference_embeddings(model, checkpoint, tiles, ("cls", "mean"))
    for feature in ("cls", "mean"):
        assert lowest_cosine(ours[feature], theirs[feature]) >= 0.9999


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, tiles = checkpoints[kind], random_tiles(3, 56)
    model = load_reference(checkpoint, "float32", "cpu")
    seen = []
    for layer in (-3, -2, -1, 0, 1, 2):
        encoder = Encoder.load(checkpoint, dtype="float32", device="cpu", layer=layer)
        ours = encoder.encode(tiles)
        theirs = reference_embeddings(model, checkpoint, tiles, ("cls", "mean"), layer)
        for feature in ("cls", "mean"):
            assert relative_error(ours[feature], theirs[feature]) <= 1e-5
        seen.append(ours["cls"])
    for negative, positive in zip(seen[:3], seen[3:], strict=True):
        np.testing.assert_array_equal(negative, positive)
    assert relative_error(seen[0], seen[1]) > 0.05
    assert relative_error(seen[1], seen[2]) > 0.05


def test_blocks_after_the_layer_are_not_read(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, tiny_config(num_layers=6), num_files=6)
    wanted = Encoder.load(checkpoint, dtype="float32", device="cpu", layer=-4)
    before = wanted.encode(random_tiles(1, 56))
    last = checkpoint.files[-1]
    junk = bytearray(last.read_bytes())
    junk[-1000:] = b"\xff" * 1000  # NaN in the last block
    last.write_bytes(junk)
    again = Encoder.load(checkpoint, dtype="float32", device="cpu", layer=-4)
    whole = Encoder.load(checkpoint, dtype="float32", device="cpu")
    np.testing.assert_array_equal(again.encode(random_tiles(1, 56))["cls"], before["cls"])
    assert np.isnan(whole.encode(random_tiles(1, 56))["cls"]).any()


@pytest.mark.parametrize(
    ("layer", "num_blocks"), [(-48, 1), (-4, 45), (-1, 48), (0, 1), (44, 45), (47, 48)]
)
def test_layers_count_like_a_list(layer: int, num_blocks: int) -> None:
    assert count_blocks(tiny_config(num_layers=48), layer) == num_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_files_make_no_difference(kind: str, tmp_path: Path) -> None:
    config, tiles = tiny_config(kind), random_tiles(2, 56)
    outputs = []
    layouts: tuple[Layout, ...] = ("remote-code", "internvl", "transformers")
    for layout in layouts:
        for num_files in (1, 4):
            folder = tmp_path / f"{layout}-{num_files}"
            checkpoint = tiny_checkpoint(folder, config, layout, num_files, seed=5)
            assert (checkpoint.layout, len(checkpoint.files)) == (layout, num_files)
            outputs.append(Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles))
    assert len(outputs) == 6
    for output in outputs[1:]:
        np.testing.assert_array_equal(output["cls"], outputs[0]["cls"])
        np.testing.assert_array_equal(output["mean"], outputs[0]["mean"])


def test_bfloat16_checkpoints_load_into_float32(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config(), seed=2, dtype="bfloat16")
    checkpoint, tiles = open_checkpoint(str(tmp_path)), random_tiles(2, 56)
    ours = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    model = load_reference(checkpoint, "float32", "cpu")
    theirs = reference_embeddings(model, checkpoint, tiles, ("mean",))
    assert relative_error(ours["mean"], theirs["mean"]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", [28, 84])
def test_another_tile_size_interpolates_positions(
    kind: str, edge: int, checkpoints: dict[str, Checkpoint]
) -> None:
    checkpoint, tiles = checkpoints[kind], random_tiles(2, edge)
    ours = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    model = load_reference(checkpoint, "float32", "cpu")
    theirs = reference_embeddings(model, checkpoint, tiles, ("cls", "mean"))
    for feature in ("cls", "mean"):
        assert relative_error(ours[feature], theirs[feature]) <= 1e-5


def test_micro_batches_give_what_one_batch_gives(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, tiles = checkpoints["rms_norm"], random_tiles(7, 56)
    whole = Encoder.load(checkpoint, dtype="float32", device="cpu", batch_tiles=7).encode(tiles)
    for batch_tiles in (1, 3, 64, None):
        encoder = Encoder.load(checkpoint, dtype="float32", device="cpu", batch_tiles=batch_tiles)
        parts = encoder.encode(tiles)
        for feature in ("cls", "mean"):
            assert parts[feature].shape == (7, 80)
            assert relative_error(parts[feature], whole[feature]) <= 1e-6


def test_no_tiles_no_rows(checkpoints: dict[str, Checkpoint]) -> None:
    encoder = Encoder.load(checkpoints["rms_norm"], dtype="bfloat16", device="cpu")
    output = encoder.encode(np.empty((0, 56, 56, 3), np.uint8))
    assert {f: (e.shape, e.dtype) for f, e in output.items()} == {
        "cls": ((0, 80), np.float32),
        "mean": ((0, 80), np.float32),
    }


def test_read_only_tiles_are_read_without_a_warning(checkpoints: dict[str, Checkpoint]) -> None:
    encoder = Encoder.load(checkpoints["rms_norm"], dtype="float32", device="cpu")
    tiles = random_tiles(5, 56)
    expected = encoder.encode(tiles)["cls"]
    view = np.frombuffer(tiles.tobytes(), np.uint8).reshape(tiles.shape)
    assert not view.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(encoder.encode(view)["cls"], expected)
    np.testing.assert_array_equal(encoder.encode(np.asfortranarray(tiles))["cls"], expected)


def test_only_the_asked_features(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["layer_norm"]
    both = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(random_tiles(1, 56))
    encoder = Encoder.load(checkpoint, dtype="float32", device="cpu", features=["mean"])
    output = encoder.encode(random_tiles(1, 56))
    assert list(output) == ["mean"]
    np.testing.assert_array_equal(output["mean"], both["mean"])
    assert relative_error(both["cls"], both["mean"]) > 0.1


def test_features_do_not_hold_on_to_the_tokens() -> None:
    tokens = torch.rand(2, 17, 80)
    for feature in (FEATURES["cls"], FEATURES["mean"]):
        assert feature(tokens).untyped_storage().nbytes() == 2 * 80 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": 3}, "layer: 3; the checkpoint has 3 blocks: -3 to -1, or 0 to 2"),
        ({"layer": -4}, "layer: -4; the checkpoint has 3 blocks"),
        ({"dtype": "float64"}, "choose one of ['bfloat16', 'float16', 'float32', 'fp8']"),
        ({"features": ["cls", "max"]}, "features: ['cls', 'max']; choose some of ['cls', 'mean', "),
        ({"features": []}, "features: []"),
        ({"attention": "flash-attn-9"}, "choose one of ['auto', 'sdpa', 'cudnn'"),
        ({"device": "tpu"}, "choose one of ['cpu', 'cuda']"),
        ({"batch_tiles": 0}, "batch_tiles: 0"),
    ],
)
def test_what_is_not_on_offer_is_a_user_error(
    options: dict[str, Any], says: str, checkpoints: dict[str, Checkpoint]
) -> None:
    asked: dict[str, Any] = {"dtype": "float32", "device": "cpu"} | options
    with pytest.raises(UserError) as caught:
        Encoder.load(checkpoints["rms_norm"], **asked)
    assert says in str(caught.value)


def test_cuda_without_cuda_is_a_user_error(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        Encoder.load(checkpoints["rms_norm"], dtype="float32", device="cuda")


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((1, 56, 56, 3), np.float32),
        np.zeros((56, 56, 3), np.uint8),
        np.zeros((1, 3, 56, 56), np.uint8),
        np.zeros((1, 56, 70, 3), np.uint8),
        np.zeros((1, 50, 50, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(
    tiles: npt.NDArray[Any], checkpoints: dict[str, Checkpoint]
) -> None:
    encoder = Encoder.load(checkpoints["rms_norm"], dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="tiles: "):
        encoder.encode(tiles)


def test_all_blocks_run_the_code_of_one(checkpoints: dict[str, Checkpoint]) -> None:
    """What a GPU's encoder compiles: one graph, without a break, for any number of tiles."""
    encoder = Encoder.load(checkpoints["rms_norm"], dtype="float32", device="cpu", batch_tiles=4)
    tiles = random_tiles(10, 56)
    plain = encoder.encode(tiles)
    torch._dynamo.reset()
    counters.clear()
    for block in encoder._network.encoder.layers:
        block.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    compiled = encoder.encode(tiles)  # batches of 4, 4 and 2
    assert counters["stats"]["unique_graphs"] == 1
    for feature, values in plain.items():
        assert relative_error(compiled[feature], values) <= 1e-6


def test_the_blocks_of_a_rank_run_the_code_of_one_too(checkpoints: dict[str, Checkpoint]) -> None:
    """Sums over ranks break the graph; the pieces must not grow with the blocks."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)  # as a rank that is just like this one would

    group = Group(0, 2, doubled)
    graphs = []
    for num_blocks in (1, 3):
        encoder = Encoder.load(
            checkpoints["rms_norm"],
            dtype="float32",
            device="cpu",
            layer=num_blocks - 1,
            group=group,
        )
        tiles = random_tiles(6, 56)
        plain = encoder.encode(tiles)
        torch._dynamo.reset()
        counters.clear()
        for block in encoder._network.encoder.layers:
            block.compile(dynamic=True, backend="aot_eager")
        compiled = encoder.encode(tiles)
        graphs.append(counters["stats"]["unique_graphs"])
        assert relative_error(compiled["cls"], plain["cls"]) <= 1e-6
    assert graphs[0] == graphs[1] > 1


def test_out_of_memory_halves_the_batch_once(
    checkpoints: dict[str, Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = Encoder.load(checkpoints["rms_norm"], dtype="float32", device="cpu", batch_tiles=6)
    tiles = random_tiles(6, 56)
    expected = encoder.encode(tiles)
    forward, room = encoder._forward, 3

    def crowded(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(batch) > room:
            raise torch.OutOfMemoryError("no room")
        return forward(batch)

    monkeypatch.setattr(encoder, "_forward", crowded)
    found = encoder.encode(tiles)
    assert encoder.batch_tiles == 3
    assert [record.message for record in caplog.records] == [
        "out of memory: batch_tiles is 3 from here on"
    ]
    for feature, values in expected.items():
        assert relative_error(found[feature], values) <= 1e-6
    room = 2
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(tiles)


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_blocks_stay_close_to_float32(
    kind: str, checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the float8 layers' torch reference, which runs on a CPU though users are refused it."""
    tiles = random_tiles(4, 56)
    expected = Encoder.load(checkpoints[kind], dtype="float32", device="cpu").encode(tiles)
    with pytest.raises(UserError, match="fp8"):
        Encoder.load(checkpoints[kind], dtype="fp8", device="cpu")
    monkeypatch.setattr("model.encoder.require_float8", lambda device: None)
    encoder = Encoder.load(checkpoints[kind], dtype="fp8", device="cpu")
    layers = [m for m in encoder._network.modules() if isinstance(m, Float8Linear)]
    assert len(layers) == 4 * checkpoints[kind].config.num_layers
    for feature, values in encoder.encode(tiles).items():
        assert lowest_cosine(values, expected[feature]) >= 0.998
        assert relative_error(values, expected[feature]) > 1e-3  # was it float8 at all?
