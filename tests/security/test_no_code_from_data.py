"""Nothing that comes from a checkpoint, a shard or a file is unpickled, imported or executed."""

from __future__ import annotations

import ast
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import open_checkpoint
from model.encoder import Encoder
from model.errors import CheckpointError
from model.reference import load_reference
from tests.builders import REPOSITORY, picture, write_checkpoint, write_tar
from tests.security.canary import Canary
from tests.stages import read_shard, tile_shard

PACKAGES = ("model", "pipeline", "jobs")
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve",
    "pickletools", "code", "codeop", "imp", "runpy",
}  # fmt: skip
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
# Methods and functions of modules, by the end of their dotted name.
FORBIDDEN_CALLS = {
    "import_module", "exec_module", "torch.load", "torch.hub.load", "jit.load", "read_pickle",
    "from_pretrained", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "yaml.unsafe_load_all", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl",
    "tempfile.mktemp", "extract", "extractall", "unpack_archive", "WebDataset", "read_webdataset",
}  # fmt: skip
FORBIDDEN_TRUE = {"allow_pickle", "trust_remote_code", "shell"}
FORBIDDEN_FALSE = {"weights_only", "use_safetensors"}
UNSAFE_NAMES = {"UnsafeLoader", "FullLoader", "YAMLObject", "Unpickler"}


def sources() -> list[Path]:
    found = sorted(p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py"))
    assert len(found) > 50
    return found


def faults(tree: ast.AST, file: str) -> Iterator[str]:
    """What a source may not do, one line each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            names = []
        for name in names:
            if set(name.split(".")) & FORBIDDEN_MODULES - {"code"} or name == "code":
                yield f"{file}: imports {name}"
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in UNSAFE_NAMES:
                yield f"{file}:{node.lineno}: {name}"
        if isinstance(node, ast.Call):
            yield from call_faults(node, file)


def call_faults(node: ast.Call, file: str) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in FORBIDDEN_BUILTINS or (
        "." in called and any(f".{called}".endswith(f".{name}") for name in FORBIDDEN_CALLS)
    ):
        yield f"{file}:{node.lineno}: {called}()"
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        unsafe = (keyword.arg in FORBIDDEN_TRUE and value is not False) or (
            keyword.arg in FORBIDDEN_FALSE and value is not True
        )
        if unsafe:
            yield f"{file}:{node.lineno}: {called}({keyword.arg}=…)"


def test_sources_neither_unpickle_nor_execute() -> None:
    found = [
        fault
        for path in sources()
        for fault in faults(ast.parse(path.read_text()), str(path.relative_to(REPOSITORY)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from cloudpickle import loads", "import ray.cloudpickle as pickle_",
        "from ray import cloudpickle", "torch.load(f)", "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)", "yaml.load(t)", "yaml.load(t, yaml.UnsafeLoader)",
        "yaml.unsafe_load(t)", "eval(t)", "exec(t)", "AutoModel.from_pretrained(m)",
        "f(trust_remote_code=True)", "subprocess.run(c, shell=True)", "os.system(c)",
        "archive.extractall(p)", "archive.extract(m)", "tempfile.mktemp()", "__import__(n)",
        "importlib.import_module(n)", "torch.load(f, weights_only=False)", "import marshal",
    ],
)  # fmt: skip
def test_the_check_finds_each(line: str) -> None:
    assert list(faults(ast.parse(line), "x.py"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    canary = Canary(tmp_path / "executed")
    yield canary
    assert not canary.file.exists(), canary.file.read_text()


def test_the_canary_sings(tmp_path: Path) -> None:
    """What must not happen below does happen where a pickle is read."""
    canary = Canary(tmp_path / "executed")
    pickle.loads(canary.pickled())
    assert canary.file.exists()


def test_a_checkpoint_executes_nothing(tmp_path: Path, canary: Canary) -> None:
    """Its weights lie beside pickles and code that `config.json` asks to be run."""
    folder = write_checkpoint(tmp_path / "model")
    before = open_checkpoint(str(folder))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "x.pth", "optimizer.pkl"):
        (folder / name).write_bytes(canary.pickled())
    torch.save({"weights": canary}, folder / "consolidated.pth")
    for name in ("modeling_intern_vit.py", "configuration_intern_vit.py", "__init__.py"):
        (folder / name).write_text(canary.source())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }
    config["custom_pipelines"] = {"x": {"impl": "modeling_intern_vit.X"}}
    (folder / "config.json").write_text(json.dumps(config))

    checkpoint = open_checkpoint(str(folder))
    assert [f.name for f in checkpoint.files] == ["model.safetensors"]
    encoder = Encoder.load(checkpoint, dtype="float32", device="cpu", features=("cls",))
    tiles = np.zeros((1, before.config.image_size, before.config.image_size, 3), np.uint8)
    assert np.isfinite(encoder.encode(tiles)["cls"]).all()
    load_reference(checkpoint, "float32", "cpu")  # transformers, as `verify --recompute` calls it


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, canary: Canary, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(canary.pickled())
    with pytest.raises(CheckpointError, match=f"has {name} but no model.safetensors"):
        open_checkpoint(str(folder))


def test_a_pickle_called_safetensors_is_refused(tmp_path: Path, canary: Canary) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(canary.pickled())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(str(folder))


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin"):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": name}})
        )
        with pytest.raises(CheckpointError, match="must map tensors to"):
            open_checkpoint(str(folder))


def object_array(canary: Canary) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([canary], dtype=object), allow_pickle=True)
    return sink.getvalue()


CARRIED = ("pyd", "pickle", "pkl", "npy", "npz", "pth", "cbor", "ten", "index")


def test_members_that_are_pickles_stay_bytes(tmp_path: Path, canary: Canary) -> None:
    """webdataset's default decoders unpickle pyd, pickle and pth members, and load npy."""
    members: list[tuple[str, bytes]] = [("a.jpg", picture(40, 40))]
    members += [(f"a.{e}", canary.pickled()) for e in CARRIED if e != "npy"]
    members += [("a.npy", object_array(canary)), ("b.pkl", canary.pickled())]
    members += [("c.jpg", canary.pickled()), ("__init__.py", canary.source().encode())]
    path = write_tar(tmp_path / "s.tar", members)
    carry = CARRIED
    (group,) = read_shard(path, carry=carry)
    assert group.samples["key"].to_pylist() == ["a", "c"]
    for extension in carry:
        value: Any = group.samples[extension].to_pylist()[0]
        assert value == dict(members)[f"a.{extension}"], extension
    rejects = {r["key"]: r["error"] for r in group.rejects.to_pylist()}
    assert rejects == {"b": "no-image", "__init__": "no-image"}
    chunks = tile_shard(path, carry=carry)
    rejected = [r for chunk in chunks for r in chunk.rejects.to_pylist()]
    assert {r["key"]: r["error"] for r in rejected} == {
        "b": "no-image",
        "c": "unidentified",
        "__init__": "no-image",
    }
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == len(members)
