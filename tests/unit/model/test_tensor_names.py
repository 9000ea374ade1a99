"""Names and shapes, against the two networks they are for."""

from __future__ import annotations

import pytest
import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from model.attention import sdpa
from model.intern_vit import InternViT
from model.tensor_names import parameter_shapes, tensor_names, tensor_shapes
from tests.checkpoints import KINDS, tiny_config


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_our_network(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"):
        network = InternViT(config, config.num_layers, sdpa)
    ours = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    assert parameter_shapes(config) == ours


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_names_are_those_of_its_model(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"):
        model = InternVLVisionModel(
            InternVLVisionConfig(
                hidden_size=80,
                num_hidden_layers=3,
                num_attention_heads=5,
                intermediate_size=320,
                image_size=56,
                norm_type=config.norm,
                use_qk_norm=config.qk_norm,
                attention_bias=config.qkv_bias,
            )
        )
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert tensor_shapes(config, "transformers", "") == theirs


@pytest.mark.parametrize(
    ("parameter", "layout", "prefix", "names"),
    [
        ("embeddings.class_embedding", "remote-code", "", ["embeddings.class_embedding"]),
        ("encoder.layers.7.ls1", "internvl", "vision_model.",
         ["vision_model.encoder.layers.7.ls1"]),
        ("encoder.layers.7.ls1", "transformers", "", ["encoder.layer.7.lambda_1"]),
        ("encoder.layers.12.norm2.bias", "transformers", "vision_tower.",
         ["vision_tower.encoder.layer.12.layernorm_after.bias"]),
        ("encoder.layers.0.attn.qkv.weight", "internvl", "vision_model.",
         ["vision_model.encoder.layers.0.attn.qkv.weight"]),
        ("encoder.layers.0.attn.qkv.weight", "transformers", "model.vision_tower.",
         [f"model.vision_tower.encoder.layer.0.attention.{p}_proj.weight" for p in "qkv"]),
        ("encoder.layers.0.attn.qkv.bias", "transformers", "",
         [f"encoder.layer.0.attention.{p}_proj.bias" for p in "qkv"]),
    ],
)  # fmt: skip
def test_where_a_parameter_lies(parameter: str, layout, prefix: str, names: list[str]) -> None:
    assert tensor_names(parameter, layout, prefix) == tuple(names)
