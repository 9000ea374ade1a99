"""Checkpoints with random weights: whole, small or full-size, for demo, tests and benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.config import Layout, ViTConfig
from model.tensor_names import Shape, parameter_shapes, tensor_names

if TYPE_CHECKING:
    import torch

# The InternViT model cards' preparation; ImageNet's mean and standard deviation.
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]


def write_random_checkpoint(
    folder: Path,
    config: ViTConfig,
    seed: int,
    layout: Layout = "remote-code",
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_files: int = 1,
) -> None:
    """Writes `config.json`, `preprocessor_config.json` and safetensors into `folder`.

    The same seed and dtype give the same network in every layout and number of files; more
    than one file come with an index. Values are scaled so that tokens stay O(1) through the
    blocks while every parameter has a say: norms are not all one, no bias or layer scale is
    zero. The internvl layout has a few tensors of other parts beside the vision model.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config_json(config, layout, dtype))
    _write_json(folder / "preprocessor_config.json", _preprocessor_json(config.image_size))

    prefix = "vision_model." if layout == "internvl" else ""
    generator = torch.Generator().manual_seed(seed)
    shapes = list(parameter_shapes(config).items())
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for i in range(num_files):
        tensors: dict[str, torch.Tensor] = {}
        first, last = (len(shapes) * n // num_files for n in (i, i + 1))
        for name, shape in shapes[first:last]:
            value = random_parameter(name, shape, generator).to(getattr(torch, dtype))
            names = tensor_names(name, layout, prefix)
            rows = value.chunk(len(names)) if len(names) > 1 else (value,)
            tensors |= {n: r.contiguous() for n, r in zip(names, rows, strict=True)}
        if layout == "internvl" and i == num_files - 1:
            tensors["mlp1.1.weight"] = torch.zeros(8, 4 * config.hidden_size)
            tensors["language_model.model.norm.weight"] = torch.ones(8)
        file = "model.safetensors"
        if num_files > 1:
            file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(t.nbytes for t in tensors.values())
    if num_files > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def random_parameter(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """A matrix keeps the size of what it multiplies; vectors scatter about their usual value."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith((".ls1", ".ls2")):
        return 0.5 + 0.1 * noise
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return 1 + 0.2 * noise
    if name.endswith(".bias"):
        return 0.2 * noise
    if name.endswith("_embedding"):
        return 0.5 * noise
    return noise / math.sqrt(math.prod(shape[1:]))  # by the number of summands


def config_json(config: ViTConfig, layout: Layout, dtype: str) -> dict[str, Any]:
    shared = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.norm_eps,
        "norm_type": config.norm,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "torch_dtype": dtype,
    }
    if layout == "transformers":
        return shared | {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "attention_bias": config.qkv_bias,
            "use_qk_norm": config.qk_norm,
            "image_size": [config.image_size] * 2,
            "patch_size": [config.patch_size] * 2,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
        }
    vision = shared | {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "use_flash_attn": True,
    }
    if layout == "remote-code":
        return vision
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "force_image_size": config.image_size,
        "select_layer": -1,
        "vision_config": vision,
    }


def _preprocessor_json(image_size: int) -> dict[str, Any]:
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": image_size,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
