"""What an InternViT is and how its pictures are prepared, read from a checkpoint's JSON files.

No torch here: the driver opens checkpoints without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import CheckpointError, UserError

Norm = Literal["rms_norm", "layer_norm"]
Layout = Literal["remote-code", "internvl", "transformers"]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class ViTConfig:
    """The numbers that make one InternViT; 3200 / 45 / 25 / 12800 / 448 / 14 in the 6B V1-5."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int  # pixels, the edge of a tile
    patch_size: int  # pixels
    norm: Norm
    qk_norm: bool
    qkv_bias: bool
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """Patches of one tile, which are also the patch positions the checkpoint has learned."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile: the class token, then the patches row by row."""
        return 1 + self.num_patches

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Preprocessor:
    """How the checkpoint wants a picture: resized, centre-cropped, (x / 255 - mean) / std."""

    resize_to: int  # pixels, the shortest edge after a bicubic resize
    crop: int  # pixels, the edge of the square tile
    mean: tuple[float, float, float]  # per RGB channel, of pixels in 0..1
    std: tuple[float, float, float]


def count_blocks(config: ViTConfig, layer: int) -> int:
    """How many blocks must run for the output of block `layer`, counted like a list's index.

    -1 is the last block, 0 the first. Raises UserError when there is no such block.
    """
    n = config.num_layers
    if not -n <= layer < n:
        raise UserError(
            f"layer: {layer}; the checkpoint has {n} blocks: -{n} to -1, or 0 to {n - 1}"
        )
    return range(1, n + 1)[layer]


# Our field: (its key, the default where config.json leaves it out).
# Source: InternVL's configuration_intern_vit.py; the 224px checkpoint is older than `norm_type`.
_INTERN_VIT_KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 3200),
    "num_layers": ("num_hidden_layers", 48),
    "num_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "norm": ("norm_type", "rms_norm"),
    "qk_norm": ("qk_normalization", True),
    "qkv_bias": ("qkv_bias", False),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
# Source: transformers' InternVLVisionConfig.
_TRANSFORMERS_KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 1024),
    "num_layers": ("num_hidden_layers", 24),
    "num_heads": ("num_attention_heads", 16),
    "intermediate_size": ("intermediate_size", 4096),
    "image_size": ("image_size", 448),
    "patch_size": ("patch_size", 14),
    "norm": ("norm_type", "layer_norm"),
    "qk_norm": ("use_qk_norm", False),
    "qkv_bias": ("attention_bias", False),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
# What every InternViT has: another value would be another network.
_FIXED = {
    "hidden_act": "gelu",
    "num_channels": 3,
    "use_moe": False,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,  # false would add a final norm
}


def parse_config(document: Json, where: str) -> tuple[ViTConfig, Layout, tuple[str, ...]]:
    """The network a `config.json` describes: its config, its layout, and the prefixes that its
    tensors' names may have.

    A top-level InternViT has no prefix; below an InternVL checkpoint's `vision_config` it has
    one. Raises CheckpointError for any other architecture, naming what was found.
    """
    nested = isinstance(document.get("vision_config"), Mapping)
    vision = document["vision_config"] if nested else document
    match vision.get("model_type"):
        case "intern_vit_6b":
            config = _parse_vit(vision, _INTERN_VIT_KEYS, where)
            return (config, "internvl", ("vision_model.",)) if nested else (
                config, "remote-code", ("",)
            )  # fmt: skip
        case "internvl_vision":
            config = _parse_vit(vision, _TRANSFORMERS_KEYS, where)
            if config.qk_norm and config.norm_eps != 1e-6:
                # transformers gives its q and k norms 1e-6 whatever layer_norm_eps says.
                raise CheckpointError(
                    f"{where}: layer_norm_eps is {config.norm_eps} with use_qk_norm; "
                    f"transformers' q and k norms know 1e-06 only"
                )
            prefixes = ("vision_tower.", "model.vision_tower.") if nested else ("",)
            return config, "transformers", prefixes
        case other:
            kind = "vision_config.model_type" if nested else "model_type"
            raise CheckpointError(
                f"{where}: not an InternViT ({kind} {other!r}, architectures "
                f"{document.get('architectures')!r}); give a checkpoint whose model_type is "
                f"'intern_vit_6b' or 'internvl_vision', or an InternVL checkpoint that has one"
            )


def _parse_vit(vision: Json, keys: Mapping[str, tuple[str, Any]], where: str) -> ViTConfig:
    for key, expected in _FIXED.items():
        found = vision.get(key, expected)
        if found != expected:
            raise CheckpointError(f"{where}: {key} is {found!r}; an InternViT has {expected!r}")

    def size(field: str) -> int:
        key, default = keys[field]
        return _square(vision.get(key, default), key, where)

    def flag(field: str) -> bool:
        key, default = keys[field]
        found = vision.get(key, default)
        if not isinstance(found, bool):
            raise CheckpointError(f"{where}: {key} is {found!r}; expected true or false")
        return found

    norm_key, norm_default = keys["norm"]
    norm = vision.get(norm_key, norm_default)
    if norm not in ("rms_norm", "layer_norm"):
        raise CheckpointError(
            f"{where}: {norm_key} is {norm!r}; expected 'rms_norm' or 'layer_norm'"
        )
    eps_key, eps_default = keys["norm_eps"]
    config = ViTConfig(
        hidden_size=size("hidden_size"),
        num_layers=size("num_layers"),
        num_heads=size("num_heads"),
        intermediate_size=size("intermediate_size"),
        image_size=size("image_size"),
        patch_size=size("patch_size"),
        norm=norm,
        qk_norm=flag("qk_norm"),
        qkv_bias=flag("qkv_bias"),
        norm_eps=_number(vision.get(eps_key, eps_default), eps_key, where),
    )
    if config.hidden_size % config.num_heads:
        raise CheckpointError(
            f"{where}: hidden_size {config.hidden_size} does not divide into "
            f"num_attention_heads {config.num_heads}"
        )
    if config.image_size % config.patch_size:
        raise CheckpointError(
            f"{where}: image_size {config.image_size} does not divide into "
            f"patches of patch_size {config.patch_size}"
        )
    return config


# CLIPImageProcessor's steps; a step that is switched off or done otherwise would need pixels
# that the tiling does not make.
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # PIL.Image.Resampling.BICUBIC
}


def parse_preprocessor(document: Json, where: str) -> Preprocessor:
    """The preparation that a `preprocessor_config.json` describes.

    Two kinds are known: CLIP's (`size` a number or `{"shortest_edge": n}`, then a centre crop;
    the InternViT model cards) and InternVL's native one (`size` `{"height", "width"}`, whose
    square is both). Raises CheckpointError, naming the key, for anything else.
    """
    for key, expected in _STEPS.items():
        found = document.get(key, expected)
        if found != expected:
            raise CheckpointError(f"{where}: {key} is {found!r}; only {expected!r} is supported")
    factor = _number(document.get("rescale_factor", 1 / 255), "rescale_factor", where)
    if abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{where}: rescale_factor is {factor}; only 1/255 is supported")

    size = document.get("size")
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        if document.get("do_center_crop"):
            raise CheckpointError(f"{where}: do_center_crop is true with size {dict(size)}")
        crop = resize_to = _square(size, "size", where)
    else:
        shortest = size
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
            shortest = size["shortest_edge"]
        resize_to = _square(shortest, "size", where)
        if document.get("do_center_crop", True) is not True:
            raise CheckpointError(f"{where}: do_center_crop is off; tiles must be square")
        crop = _square(document.get("crop_size"), "crop_size", where)
    if crop > resize_to:
        raise CheckpointError(f"{where}: crop_size {crop} is larger than size {resize_to}")
    mean, std = (_channels(document.get(k), k, where) for k in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise CheckpointError(f"{where}: image_std is {list(std)}; expected positive numbers")
    return Preprocessor(resize_to, crop, mean, std)


def _square(value: object, key: str, where: str) -> int:
    """A positive whole number, also where it is written as two equal ones."""
    found = value
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        value = [value["height"], value["width"]]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} is {found!r}; expected a positive whole number")
    return value


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{where}: {key} is {value!r}; expected a positive number")
    return float(value)


def _channels(value: object, key: str, where: str) -> tuple[float, float, float]:
    if (
        not isinstance(value, list)
        or len(value) != 3
        or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value)
    ):
        raise CheckpointError(f"{where}: {key} is {value!r}; expected three numbers")
    red, green, blue = map(float, value)
    return red, green, blue
