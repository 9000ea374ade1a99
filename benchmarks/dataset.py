"""Input that looks like the web's: JPEGs of LAION's sizes made of the demo's photographs, shards
of them as img2dataset writes them, and a small model at the real resolution."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from model.config import ViTConfig
from model.random_checkpoint import write_random_checkpoint

NUM_PICTURES = 60
MEDIAN_LONG_SIDE = 756  # pixels; of the sample the prototype was measured with
# Web pictures come in a few shapes.
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
# 448 pixels and 1025 tokens as the real ones. Small, so that tiling counts beside it: about four
# times the cost of tiling, on a core, tile for tile.
SMALL_MODEL = ViTConfig(
    hidden_size=80,
    num_layers=2,
    num_heads=5,
    intermediate_size=320,
    image_size=448,
    patch_size=14,
    norm="rms_norm",
    qk_norm=True,
    qkv_bias=False,
)


def laion_like(num: int = NUM_PICTURES, seed: int = 0) -> list[bytes]:
    """Seeded JPEGs; the same bytes each time with the same Pillow."""
    rng = np.random.default_rng(seed)
    photographs = _photographs()
    pictures = []
    for index in range(num):
        long_side = int(np.clip(MEDIAN_LONG_SIDE * np.exp(0.5 * rng.standard_normal()), 240, 2048))
        # every fourth has a shape of its own
        aspect = rng.uniform(0.6, 1.9) if index % 4 == 3 else float(rng.choice(ASPECTS))
        width, height = (
            (long_side, round(long_side / aspect))
            if aspect >= 1
            else (round(long_side * aspect), long_side)
        )
        photograph = photographs[int(rng.integers(len(photographs)))]
        pixels = np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        # Enlarged photographs lack the grain that makes up most of a JPEG's bytes.
        grain = rng.normal(0, 4, (height, width, 1)).astype(np.int16)
        sink = io.BytesIO()
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
            sink, "JPEG", quality=85
        )
        pictures.append(sink.getvalue())
    return pictures


def write_shard(path: Path, pictures: Sequence[bytes], num: int, first: int = 0) -> Path:
    """A tar of `num` samples (jpg, txt, json) with the pictures in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index in range(first, first + num):
            key = f"{index:09d}"
            fields = json.dumps({"key": key, "url": f"u/{key}"}).encode()
            members = (
                ("jpg", pictures[index % len(pictures)]),
                ("txt", f"caption of {key}".encode()),
                ("json", fields),
            )
            for extension, content in members:
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, num_shards: int, num_pictures: int, pictures: list[bytes]) -> Path:
    """`num_shards` tars of `num_pictures` samples each; keys are unique over all of them."""
    for shard in range(num_shards):
        write_shard(folder / f"{shard:05d}.tar", pictures, num_pictures, shard * num_pictures)
    return folder


def write_small_model(folder: Path, config: ViTConfig = SMALL_MODEL) -> Path:
    """In transformers' own layout, which tessera and `from_pretrained` both read."""
    write_random_checkpoint(folder, config, seed=0, layout="transformers")
    return folder


def _photographs() -> list[Image.Image]:
    folder = files("jobs.pictures")
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.name.endswith((".jpg", "webp"))
    )
    return [Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB") for name in names]
