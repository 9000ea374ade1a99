"""Names and shapes of an InternViT's parameters, and where a checkpoint keeps them.

Our own names are those of InternVL's remote code, so two of the three layouts differ by a
prefix at most. Pure functions: no torch, no files.
"""

from __future__ import annotations

import re
from math import prod

from model.config import Layout, ViTConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ViTConfig) -> dict[str, Shape]:
    """Every parameter of the whole network, in the order of the forward pass."""
    D, M, p = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, Shape] = {
        "embeddings.class_embedding": (1, 1, D),
        "embeddings.position_embedding": (1, config.num_tokens, D),
        "embeddings.patch_embedding.weight": (D, 3, p, p),
        "embeddings.patch_embedding.bias": (D,),
    }
    block: dict[str, Shape] = {"norm1.weight": (D,), "attn.qkv.weight": (3 * D, D)}
    if config.norm == "layer_norm":
        block["norm1.bias"] = block["norm2.bias"] = (D,)
    if config.qkv_bias:
        block["attn.qkv.bias"] = (3 * D,)
    if config.qk_norm:
        block["attn.q_norm.weight"] = block["attn.k_norm.weight"] = (D,)
    block |= {
        "attn.proj.weight": (D, D),
        "attn.proj.bias": (D,),
        "ls1": (D,),
        "norm2.weight": (D,),
        "mlp.fc1.weight": (M, D),
        "mlp.fc1.bias": (M,),
        "mlp.fc2.weight": (D, M),
        "mlp.fc2.bias": (D,),
        "ls2": (D,),
    }
    for i in range(config.num_layers):
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def num_parameters(config: ViTConfig) -> int:
    return sum(prod(shape) for shape in parameter_shapes(config).values())


# Ours → transformers' (modeling_internvl.py, InternVLVisionModel), but for the fused qkv.
_TRANSFORMERS_NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PARAMETER = re.compile(r"(?:encoder\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


def tensor_names(parameter: str, layout: Layout, prefix: str) -> tuple[str, ...]:
    """The checkpoint's tensors whose rows, one below the other, are our `parameter`.

    One name, except for qkv in the transformers layout: three tensors of equal size.
    """
    if layout != "transformers":
        return (prefix + parameter,)
    match = _PARAMETER.fullmatch(parameter)
    assert match is not None, parameter
    block, module, kind = match[1], match[2], match[3] or ""
    if block is not None:
        prefix += f"encoder.layer.{block}."
    if module == "attn.qkv":
        return tuple(f"{prefix}attention.{part}_proj{kind}" for part in "qkv")
    return (prefix + _TRANSFORMERS_NAMES[module] + kind,)


def tensor_shapes(config: ViTConfig, layout: Layout, prefix: str) -> dict[str, Shape]:
    """Every tensor that a whole checkpoint of this layout has."""
    shapes: dict[str, Shape] = {}
    for parameter, (rows, *rest) in parameter_shapes(config).items():
        names = tensor_names(parameter, layout, prefix)
        for name in names:
            shapes[name] = (rows // len(names), *rest)
    return shapes
