"""Reading config.json and preprocessor_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.attention import sdpa
from model.checkpoint import open_checkpoint, write_random_checkpoint
from model.config import Preprocessor, parse_config, parse_preprocessor
from model.encoder import Encoder
from model.errors import CheckpointError
from model.intern_vit import InternViT
from model.reference import load_reference, reference_embeddings
from model.tensor_names import num_parameters
from tests.checkpoints import edit_tensors, random_tiles, tiny_config
from tests.unit.model.family import FAMILY, MILLIONS, shrunk

CARD: dict[str, Any] = {
    "crop_size": 448,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 448,
}
NATIVE: dict[str, Any] = {
    "crop_size": None,
    "crop_to_patches": False,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "max_patches": 12,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 448, "width": 448},
}


@pytest.mark.parametrize("name", FAMILY)
def test_full_size_networks_count_what_the_cards_say(name: str) -> None:
    config, _, _ = parse_config(FAMILY[name], name)
    with torch.device("meta"):
        network = InternViT(config, config.num_layers, sdpa)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    # Cards round to ten millions, and V1-0 (1025 positions) and 224px (257) share one figure.
    assert millions == pytest.approx(MILLIONS[name], abs=5)
    assert num_parameters(config) / 1e6 == millions


def test_v1_5_is_the_network_of_its_card() -> None:
    config, layout, prefixes = parse_config(FAMILY["InternViT-6B-448px-V1-5"], "config.json")
    assert (config.hidden_size, config.num_layers, config.num_heads) == (3200, 45, 25)
    assert (config.num_patches, config.num_tokens, config.head_dim) == (1024, 1025, 128)
    assert (config.norm, config.qk_norm, config.qkv_bias) == ("rms_norm", True, False)
    assert (layout, prefixes) == ("remote-code", ("",))
    assert num_parameters(config) == 5_536_496_000  # 5.54 B


def test_the_224px_card_leaves_norm_type_to_its_default() -> None:
    assert "norm_type" not in FAMILY["InternViT-6B-224px"]
    config, _, _ = parse_config(FAMILY["InternViT-6B-224px"], "config.json")
    assert (config.norm, config.num_layers, config.num_tokens) == ("rms_norm", 48, 257)


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_of_the_family_embeds_as_transformers_does(name: str, tmp_path: Path) -> None:
    document = shrunk(FAMILY[name])
    config, layout, prefixes = parse_config(document, name)
    write_random_checkpoint(tmp_path, config, seed=1, layout=layout)
    (tmp_path / "config.json").write_text(json.dumps(document))
    if layout == "transformers":  # the vision model below the prefix of a whole InternVL

        def nest(tensors: dict[str, torch.Tensor]) -> None:
            for key in list(tensors):
                tensors[prefixes[-1] + key] = tensors.pop(key)
            tensors["language_model.lm_head.weight"] = torch.ones(4, 4)

        edit_tensors(tmp_path / "model.safetensors", nest)
    checkpoint = open_checkpoint(str(tmp_path))
    tiles = random_tiles(2, 56)
    ours = Encoder.load(checkpoint, dtype="float32", device="cpu").encode(tiles)
    theirs = reference_embeddings(
        load_reference(checkpoint, "float32", "cpu"), checkpoint, tiles, ("cls", "mean")
    )
    for feature in ("cls", "mean"):
        error = np.linalg.norm(ours[feature] - theirs[feature]) / np.linalg.norm(theirs[feature])
        assert error <= 1e-5


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (
            {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": {}},
            "not an InternViT (vision_config.model_type None, architectures ['CLIPModel'])",
        ),
        (
            {"model_type": "vit", "architectures": ["ViTModel"]},
            "not an InternViT (model_type 'vit', architectures ['ViTModel'])",
        ),
        ({}, "not an InternViT (model_type None"),
    ],
)
def test_another_architecture_is_named(document: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(document, "here/config.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("here/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        ("InternViT-300M-448px", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("InternViT-300M-448px", {"num_channels": 4}, "num_channels is 4"),
        ("InternViT-300M-448px", {"use_moe": True}, "use_moe is True"),
        ("InternViT-300M-448px", {"hidden_size": "1024"}, "hidden_size is '1024'"),
        ("InternViT-300M-448px", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("InternViT-300M-448px", {"num_attention_heads": 15}, "num_attention_heads 15"),
        ("InternViT-300M-448px", {"image_size": 450}, "image_size 450"),
        ("InternViT-300M-448px", {"norm_type": "batch_norm"}, "norm_type is 'batch_norm'"),
        ("InternViT-300M-448px", {"qkv_bias": "yes"}, "qkv_bias is 'yes'"),
        ("InternViT-300M-448px", {"layer_norm_eps": None}, "layer_norm_eps is None"),
        ("InternVL3-1B-hf", {"image_size": [448, 224]}, "image_size is [448, 224]"),
        ("InternVL3-1B-hf", {"use_mean_pooling": False}, "use_mean_pooling is False"),
        ("InternVL3-38B-hf", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
    ],
)
def test_a_key_we_cannot_follow_is_named(base: str, changes: dict[str, Any], says: str) -> None:
    document = dict(FAMILY[base])
    if "vision_config" in document:
        document["vision_config"] = document["vision_config"] | changes
    else:
        document |= changes
    with pytest.raises(CheckpointError) as caught:
        parse_config(document, "config.json")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (CARD, (448, 448)),
        (CARD | {"size": 512}, (512, 448)),
        (CARD | {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
         (224, 224)),
        (NATIVE, (448, 448)),
    ],
)  # fmt: skip
def test_preprocessors_of_the_model_cards(
    document: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert parse_preprocessor(document, "p.json") == Preprocessor(
        *expected, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (CARD | {"resample": 2}, "resample is 2"),
        (CARD | {"do_resize": False}, "do_resize is False"),
        (CARD | {"do_normalize": False}, "do_normalize is False"),
        (CARD | {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        (CARD | {"size": {"longest_edge": 448}}, "size is {'longest_edge': 448}"),
        (CARD | {"size": None}, "size is None"),
        (CARD | {"do_center_crop": False}, "do_center_crop is off"),
        (CARD | {"crop_size": None}, "crop_size is None"),
        (CARD | {"crop_size": 512}, "crop_size 512 is larger than size 448"),
        (CARD | {"crop_size": {"height": 448, "width": 224}}, "crop_size is {'height': 448"),
        (CARD | {"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]"),
        (CARD | {"image_std": [0.2, 0.0, 0.2]}, "image_std is [0.2, 0.0, 0.2]"),
        (NATIVE | {"size": {"height": 448, "width": 224}}, "size is {'height': 448"),
        (NATIVE | {"do_center_crop": True}, "do_center_crop is true with size"),
    ],
)
def test_a_preparation_we_cannot_follow_is_named(document: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_preprocessor(document, "here/preprocessor_config.json")
    assert str(caught.value).startswith("here/preprocessor_config.json: ")
    assert says in str(caught.value)


def test_tiles_must_divide_into_patches(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config(), seed=0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CARD | {"crop_size": 440}))
    with pytest.raises(CheckpointError, match="tiles of 440 pixels do not divide into patches"):
        open_checkpoint(str(tmp_path))
