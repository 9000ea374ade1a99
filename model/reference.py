"""The oracle: transformers' own InternVLVisionModel, filled from a checkpoint of any layout.

For tests, `verify --recompute` and benchmarks. It shares with the encoder the checkpoint's
files and config, and nothing of the network, the naming, or the preparation of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from model.checkpoint import Checkpoint

# InternVL's names → transformers', applied in turn.
_RENAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
)


def load_reference(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """transformers' model with the checkpoint's weights, on the device, ready to run.

    Raises RuntimeError from torch when a tensor of the checkpoint has no place in it.
    """
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = checkpoint.config
    options: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "norm_type": config.norm,
        "layer_norm_eps": config.norm_eps,
        "use_qk_norm": config.qk_norm,
        "attention_bias": config.qkv_bias,
        "use_mean_pooling": True,  # false would add a final norm
        "attn_implementation": "sdpa",
    }
    with torch.device("meta"):
        model: Any = InternVLVisionModel(InternVLVisionConfig(**options))
    for name, module in model.named_modules():
        if name.endswith((".q_norm", ".k_norm")) and config.qk_norm:
            module.variance_epsilon = config.norm_eps  # as InternVL; transformers fixes 1e-6

    weights: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            if name.startswith(checkpoint.prefix):
                renamed = _to_transformers(name.removeprefix(checkpoint.prefix), tensor)
                weights |= {n: t.to(device, getattr(torch, dtype)) for n, t in renamed.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _to_transformers(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if ".attention.qkv." not in name:
        return {name: tensor}
    q, k, v = tensor.chunk(3)
    return {
        name.replace("qkv", f"{part}_proj"): t for part, t in zip("qkv", (q, k, v), strict=True)
    }


@torch.inference_mode()
def reference_embeddings(
    model: Any,
    checkpoint: Checkpoint,
    tiles: npt.NDArray[np.uint8],
    features: Sequence[str],
    layer: int = -1,
) -> dict[str, npt.NDArray[np.float32]]:
    """What `Encoder.encode` must give: uint8 [n, S, S, 3] → each feature, float32, [n, hidden] or
    [n, tokens, D].

    `layer` as for the encoder. All tiles go through in one pass.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        image_mean=list(checkpoint.preprocessor.mean),
        image_std=list(checkpoint.preprocessor.std),
    )
    pixels = processor(images=list(tiles), return_tensors="pt")["pixel_values"]
    outputs = model(pixels.to(model.device, model.dtype), output_hidden_states=True)
    blocks = outputs.hidden_states[1:]  # the first is what enters block 0
    assert len(blocks) == checkpoint.config.num_layers
    tokens = blocks[layer].float().cpu()  # [n, N, hidden]
    pooled: dict[str, Callable[[], torch.Tensor]] = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens[:, 1:].mean(1),
        "tokens": lambda: tokens,
        "tokens-2x2": lambda: _pixel_shuffle(tokens[:, 1:]),
    }
    return {feature: pooled[feature]().numpy() for feature in features}


def _pixel_shuffle(patches: torch.Tensor) -> torch.Tensor:
    """As InternVLModel.get_image_features calls it, before the projector."""
    from transformers import InternVLModel

    side = int(patches.shape[1] ** 0.5)
    grid = patches.reshape(len(patches), side, side, -1)
    shuffle: Any = InternVLModel.pixel_shuffle  # a method that looks at nothing of its object
    shuffled: torch.Tensor = shuffle(None, grid, scale_factor=0.5)
    return shuffled.reshape(len(patches), -1, shuffled.shape[-1])
