"""Tiny checkpoints and tiles that the tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file

from model.checkpoint import Checkpoint, open_checkpoint, write_random_checkpoint
from model.config import Layout, ViTConfig

KINDS = ("rms_norm", "layer_norm")  # the 6B's and the 300M's


def tiny_config(kind: str = "rms_norm", image_size: int = 56, num_layers: int = 3) -> ViTConfig:
    """5 heads, hidden size 80. rms_norm comes with q/k norm, layer_norm with qkv bias."""
    return ViTConfig(
        hidden_size=80,
        num_layers=num_layers,
        num_heads=5,
        intermediate_size=320,
        image_size=image_size,
        patch_size=14,
        norm="rms_norm" if kind == "rms_norm" else "layer_norm",
        qk_norm=kind == "rms_norm",
        qkv_bias=kind == "layer_norm",
    )


def tiny_checkpoint(
    folder: Path,
    config: ViTConfig | None = None,
    layout: Layout = "remote-code",
    num_files: int = 1,
    seed: int = 0,
) -> Checkpoint:
    write_random_checkpoint(folder, config or tiny_config(), seed, layout, num_files=num_files)
    return open_checkpoint(str(folder))


def random_tiles(num_tiles: int, edge: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Noise in smooth patches: uint8 [n, edge, edge, 3], every value from 0 to 255 likely."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_tiles, edge // 7, edge // 7, 3))
    fine = rng.integers(-40, 41, (num_tiles, edge, edge, 3))
    return np.clip(coarse.repeat(7, axis=1).repeat(7, axis=2) + fine, 0, 255).astype(np.uint8)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None takes a key out."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        document.pop(key, None)
        if value is not None:
            document[key] = value
    path.write_text(json.dumps(document))


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Reads a safetensors file, lets `edit` change the dict of tensors, and writes it again."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
