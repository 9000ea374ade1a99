"""The ready configs: each loads, says all there is to say, and explains it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from jobs.config import ExtractConfig, load_config
from jobs.yaml_file import read_yaml

CONFIGS = Path(str(files("jobs.configs")))
DATASETS = ("coyo-700m", "laion-coco", "laion2b-en", "wukong")
MADE_BY_THE_DEMO = {"input": ("in",), "output": "out", "model": "m"}
# What img2dataset writes into a sample's JSON by itself (its downloader.py), the columns that the
# examples in its dataset_examples/ keep, and the caption beside the picture.
OF_IMG2DATASET = {"url", "caption", "key", "sha256", "width", "height", "original_width", "exif"}
KEPT = {
    "laion2b-en": {"NSFW", "similarity", "LICENSE"},
    "laion-coco": {
        "similarity", "hash", "punsafe", "pwatermark", "top_caption", "all_captions",
        "all_similarities",
    },
    "coyo-700m": {
        "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2",
        "nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2",
    },
    "wukong": set(),
}  # fmt: skip


def test_all_of_them_are_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted([*DATASETS, "local-demo"])


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_config_loads_and_leaves_nothing_out(name: str) -> None:
    file = CONFIGS / f"{name}.yaml"
    config = load_config(file, {})
    assert set(read_yaml(file)) == set(ExtractConfig.model_fields)
    assert config.input == (f"s3://YOUR-BUCKET/{name}/data",)
    assert config.output == f"s3://YOUR-BUCKET/{name}/internvit-6b"
    assert (config.tiling, config.max_upscale, config.image_key) == ("dynamic", 2.0, ("jpg",))
    assert (config.replicas, config.tensor_parallel, config.max_reject_rate) == (None, 1, 0.05)
    assert config.storage_options == {}


@pytest.mark.parametrize("name", DATASETS)
def test_carried_members_are_those_that_img2dataset_writes(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", {})
    assert config.carry[:3] == ("txt", "json:url", "json:sha256")
    fields = {member.removeprefix("json:") for member in config.carry if member != "txt"}
    assert fields <= OF_IMG2DATASET | KEPT[name]


def test_the_demo_config_loads() -> None:
    config = load_config(CONFIGS / "local-demo.yaml", MADE_BY_THE_DEMO)
    assert (config.max_tiles, config.dtype) == (6, "float32")
    assert (config.replicas, config.max_reject_rate) == ((1, 1), 0.25)


@pytest.mark.parametrize("name", [*DATASETS, "local-demo"])
def test_every_field_is_explained(name: str) -> None:
    """A comment stands right above each key."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if line[:1].isalpha()]
    assert len(keys) > 5
    for number in keys:
        assert lines[number - 1].startswith("# "), lines[number]
