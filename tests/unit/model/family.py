"""The `config.json` keys and sizes of the published InternViT checkpoints.

Put together from the model cards' tables, InternVL's configuration_intern_vit.py, the
`vision_config` blocks of InternVL's own checkpoints (remote-code keys), and the blocks that
conversion scripts to transformers' format write (native keys).
"""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    },
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "num_channels": 3,
    "patch_size": 14,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_bfloat16": True,
    "use_flash_attn": True,
}
_6B = _SHARED | {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_attention_heads": 25,
    "qk_normalization": True,
    "qkv_bias": False,
}
_300M = _SHARED | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 448,
    "qk_normalization": False,
    "qkv_bias": True,
}
# transformers-native, as InternVL's conversion writes it: pairs, other key names.
_NATIVE_SHARED = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "image_size": [448, 448],
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "layer_norm_eps": 1e-06,
    "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision",
    "num_channels": 3,
    "patch_size": [14, 14],
    "projection_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
}
_NATIVE_300M = _NATIVE_SHARED | {
    "attention_bias": True,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "use_qk_norm": False,
}
_NATIVE_6B = _NATIVE_SHARED | {
    "attention_bias": False,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "use_qk_norm": True,
}

FAMILY: dict[str, dict[str, Any]] = {
    # The first one is older than norm_type.
    "InternViT-6B-224px": _6B | {"num_hidden_layers": 48, "image_size": 224},
    "InternViT-6B-448px-V1-0": _6B | {"num_hidden_layers": 48, "image_size": 448},
    "InternViT-6B-448px-V1-2": _6B
    | {"num_hidden_layers": 45, "image_size": 448, "norm_type": "rms_norm"},
    "InternViT-6B-448px-V1-5": _6B
    | {"num_hidden_layers": 45, "image_size": 448, "norm_type": "rms_norm"},
    "InternViT-6B-448px-V2_5": _6B
    | {"num_hidden_layers": 45, "image_size": 448, "norm_type": "rms_norm", "use_moe": False},
    "InternViT-300M-448px": _300M,
    "InternViT-300M-448px-V2_5": _300M | {"use_moe": False, "num_experts": 8},
    "InternVL3-1B": {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 448,
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "select_layer": -1,
        "vision_config": _300M | {"use_moe": False},
    },
    "InternVL3-1B-hf": {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "vision_config": _NATIVE_300M,
        "vision_feature_layer": -1,
    },
    "InternVL3-38B-hf": {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "vision_config": _NATIVE_6B,
    },
}

# What the model cards say, in millions of parameters, for the vision model alone.
MILLIONS = {
    "InternViT-6B-224px": 5903,
    "InternViT-6B-448px-V1-0": 5903,
    "InternViT-6B-448px-V1-2": 5540,
    "InternViT-6B-448px-V1-5": 5540,
    "InternViT-6B-448px-V2_5": 5540,
    "InternViT-300M-448px": 304,
    "InternViT-300M-448px-V2_5": 304,
    "InternVL3-1B": 304,
    "InternVL3-1B-hf": 304,
    "InternVL3-38B-hf": 5540,
}


def shrunk(document: dict[str, Any]) -> dict[str, Any]:
    """The same keys for a network of 3 blocks, 5 heads, and 56-pixel tiles."""
    if "vision_config" in document:
        return document | {"vision_config": shrunk(document["vision_config"])}
    small: dict[str, Any] = {
        "hidden_size": 80,
        "intermediate_size": 320,
        "num_attention_heads": 5,
        "num_hidden_layers": 3,
        "image_size": [56, 56] if isinstance(document["image_size"], list) else 56,
    }
    return document | small
