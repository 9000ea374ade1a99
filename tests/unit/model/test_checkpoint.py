"""Opening checkpoints: what is accepted, and that each fault is one line that names its place."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import INDEX, open_checkpoint, read_header, weights_digest
from model.errors import CheckpointError
from tests.checkpoints import edit_json, edit_tensors, tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[3]
LS1 = "encoder.layers.0.ls1"


def message(source: Path | str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source), revision)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_opens_as_what_it_is(tmp_path: Path) -> None:
    config = tiny_config("layer_norm")
    checkpoint = tiny_checkpoint(tmp_path, config, num_files=2)
    assert checkpoint.source == str(tmp_path)
    assert checkpoint.folder == tmp_path
    assert checkpoint.revision is None
    assert checkpoint.config == config
    assert (checkpoint.preprocessor.resize_to, checkpoint.preprocessor.crop) == (56, 56)
    assert checkpoint.preprocessor.mean == (0.485, 0.456, 0.406)
    assert [f.name for f in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (checkpoint.layout, checkpoint.prefix) == ("remote-code", "")


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_native_vision_models_are_found_below_either_prefix(prefix: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, layout="transformers")
    vision = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "internvl", "vision_config": vision})
    )

    def nest(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)
        tensors["model.language_model.norm.weight"] = torch.ones(3)

    edit_tensors(tmp_path / "model.safetensors", nest)
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.layout, checkpoint.prefix) == ("transformers", prefix)


def test_shards_without_the_vision_model_are_left_alone(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, layout="internvl", num_files=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["language_model.lm_head.weight"] = "model-00003-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert len(open_checkpoint(str(tmp_path)).files) == 2


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(LS1, None), f"tensor {LS1} is missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.endswith(".ls1")],
            f"tensor {LS1} (and 2 more) is missing",
        ),
        (
            lambda t: t.update({"head.weight": torch.ones(2)}) if LS1 in t else None,
            "tensor head.weight has no place in the network",
        ),
        (
            lambda t: t.update({LS1: torch.ones(81)}) if LS1 in t else None,
            f"tensor {LS1} has shape [81] where config.json asks for [80]",
        ),
        (
            lambda t: t.update({LS1: t[LS1].to(torch.float64)}) if LS1 in t else None,
            f"tensor {LS1} is F64; one of ['F32', 'BF16', 'F16'] is needed",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    edit: Callable[[dict[str, Any]], Any], says: str, num_files: int, tmp_path: Path
) -> None:
    for file in tiny_checkpoint(tmp_path, num_files=num_files).files:
        edit_tensors(file, edit)
    assert says in message(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    files = tiny_checkpoint(tmp_path, num_files=2).files
    edit_tensors(files[1], lambda t: t.update({LS1: torch.ones(80)}))
    assert f"tensor {LS1} is in model-00002-of-00002.safetensors and in" in message(tmp_path)


def test_other_parts_count_only_outside_the_prefix(tmp_path: Path) -> None:
    (file,) = tiny_checkpoint(tmp_path, layout="internvl").files
    edit_tensors(file, lambda t: t.update({"other.weight": torch.ones(1)}))
    open_checkpoint(str(tmp_path))
    edit_tensors(file, lambda t: t.update({"vision_model.head.weight": torch.ones(1)}))
    assert "tensor vision_model.head.weight has no place" in message(tmp_path)


def test_a_config_of_another_shape_is_refused_before_loading(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=4)
    assert "tensor encoder.layers.3.norm1.weight (and" in message(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=2)
    text = message(tmp_path)
    assert "tensor encoder.layers.2." in text
    assert "(and 12 more) has no place in the network of config.json" in text
    edit_json(tmp_path / "config.json", num_hidden_layers=3, qkv_bias=True)
    assert "tensor encoder.layers.0.attn.qkv.bias (and 2 more) is missing" in message(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_json_file_that_is_missing_or_broken(file: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / file).write_text('{"hidden_size": ')
    assert f"{tmp_path / file}: not valid JSON" in message(tmp_path)
    (tmp_path / file).write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / file}: not valid JSON" in message(tmp_path)
    (tmp_path / file).write_text("[]")
    assert f"{tmp_path / file}: expected a JSON object" in message(tmp_path)
    (tmp_path / file).unlink()
    assert f"{tmp_path / file}: no such file" in message(tmp_path)
    (tmp_path / file).mkdir()
    assert f"{tmp_path / file}: cannot be read: Is a directory" in message(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (file,) = tiny_checkpoint(tmp_path).files
    file.rename(tmp_path / "pytorch_model.bin")
    assert message(tmp_path) == (
        f"{tmp_path}: has pytorch_model.bin but no model.safetensors; only safetensors are read"
    )
    (tmp_path / "pytorch_model.bin").unlink()
    assert f"{tmp_path / 'model.safetensors'}: cannot be read: No such file" in message(tmp_path)


def test_a_broken_index(tmp_path: Path) -> None:
    files = tiny_checkpoint(tmp_path, num_files=2).files
    good = (tmp_path / INDEX).read_text()
    files[1].rename(tmp_path / "away")
    assert f"{files[1]}: cannot be read: No such file" in message(tmp_path)
    (tmp_path / "away").rename(files[1])
    for weight_map in (None, [], {LS1: 3}, {LS1: "../x.safetensors"}, {LS1: "pytorch_model.bin"}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert f"{tmp_path / INDEX}: weight_map must map tensors" in message(tmp_path)
    (tmp_path / INDEX).write_text(good[:100])
    assert f"{tmp_path / INDEX}: not valid JSON" in message(tmp_path)
    (tmp_path / INDEX).write_text(good)
    assert len(open_checkpoint(str(tmp_path)).files) == 2


def test_an_index_without_the_vision_model(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, layout="internvl", num_files=2)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"mlp1.0": "a.safetensors"}}))
    assert f"{tmp_path / INDEX}: no tensor below vision_model." in message(tmp_path)


def header(document: object, data: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a safetensors file, or cut short"),
        (b"\x80\x02}q\x00", "not a safetensors file, or cut short"),
        (b"PK\x03\x04" + b"x" * 100, "not a safetensors file, or cut short"),
        (struct.pack("<Q", 50) + b"{", "not a safetensors file, or cut short"),
        (struct.pack("<Q", 2) + b"{x", "the safetensors header is corrupt"),
        (header([1]), "the safetensors header is corrupt"),
        (header({"a": {"dtype": "F32"}}), "the safetensors header is corrupt"),
        (header({"a": ONE["a"] | {"data_offsets": [0]}}), "the safetensors header is corrupt"),
        (header({"a": ONE["a"] | {"shape": None}}), "the safetensors header is corrupt"),
        (header({"a": ONE["a"] | {"shape": [3]}}, b"x" * 8), "tensor a has 8 bytes for 12"),
        (header(ONE, b"x" * 7), "bytes where its header says"),
        (header(ONE, b"x" * 9), "bytes where its header says"),
    ],
)
def test_a_broken_safetensors_file(content: bytes, says: str, tmp_path: Path) -> None:
    (file,) = tiny_checkpoint(tmp_path).files
    file.write_bytes(content)
    text = message(tmp_path)
    assert text.startswith(f"{file}: ")
    assert says in text


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    files = tiny_checkpoint(tmp_path, num_files=3).files
    whole = files[1].stat().st_size
    with files[1].open("rb+") as stream:
        stream.truncate(whole - 1000)
    assert f"{files[1]}: has {whole - 1000} bytes where its header says {whole}" in message(
        tmp_path
    )


def test_headers_are_read_as_safetensors_writes_them(tmp_path: Path) -> None:
    (file,) = tiny_checkpoint(tmp_path).files
    tensors = read_header(file)
    assert (tensors[LS1].dtype, tensors[LS1].shape) == ("F32", (80,))
    assert tensors["embeddings.patch_embedding.weight"].shape == (80, 3, 14, 14)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert message(tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such folder"
    assert message("./nothing") == "./nothing: no such folder"
    (tmp_path / "file").write_text("")
    assert message(tmp_path / "file") == f"{tmp_path / 'file'}: no such folder"


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    assert "a folder has no revision; leave out 'main'" in message(tmp_path, "main")


def test_the_digest_follows_weights_and_config_not_the_folder(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path / "a", num_files=3)
    digest = weights_digest(first)
    assert len(bytes.fromhex(digest)) == 32
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert weights_digest(open_checkpoint(str(tmp_path / "b"))) == digest
    edit_json(tmp_path / "b" / "config.json", transformers_version="9.9")
    assert weights_digest(open_checkpoint(str(tmp_path / "b"))) == digest

    seen = {digest, weights_digest(tiny_checkpoint(tmp_path / "c", num_files=3, seed=1))}
    edit_json(tmp_path / "b" / "config.json", layer_norm_eps=1e-5)
    seen.add(weights_digest(open_checkpoint(str(tmp_path / "b"))))
    edit_json(tmp_path / "b" / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    seen.add(weights_digest(open_checkpoint(str(tmp_path / "b"))))
    content = bytearray(first.files[1].read_bytes())
    content[-1] ^= 1
    first.files[1].write_bytes(content)
    seen.add(weights_digest(first))
    assert len(seen) == 5


def test_random_checkpoints_repeat_by_seed(tmp_path: Path) -> None:
    one, again = (tiny_checkpoint(tmp_path / name, seed=7) for name in "ab")
    other = tiny_checkpoint(tmp_path / "c", seed=8)
    assert one.files[0].read_bytes() == again.files[0].read_bytes()
    assert one.files[0].read_bytes() != other.files[0].read_bytes()


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    script = (
        "import sys; from model.checkpoint import open_checkpoint, weights_digest\n"
        "weights_digest(open_checkpoint(sys.argv[1]))\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'pickle5') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_no_code_of_a_checkpoint_can_run() -> None:
    sources = sorted((ROOT / "model").glob("*.py"))
    assert len(sources) >= 8
    for source in sources:
        text = source.read_text()
        for word in ("trust_remote_code", "import pickle", "torch.load(", "from_pretrained"):
            assert word not in text, (source, word)
