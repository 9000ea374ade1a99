"""Checkpoints: found, fetched, and checked to the last tensor before anything is loaded.

Importing this brings in neither torch nor transformers: the driver opens checkpoints, only
replicas load them. Safetensors only: no pickle is read and no code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from model import hub
from model.config import Layout, Preprocessor, ViTConfig, parse_config, parse_preprocessor
from model.errors import CheckpointError
from model.random_checkpoint import write_random_checkpoint
from model.tensor_names import tensor_shapes

__all__ = [
    "Checkpoint",
    "open_checkpoint",
    "open_shape",
    "weights_digest",
    "write_random_checkpoint",
]

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every tensor has been checked against its config."""

    source: str  # as the user gave it: a folder or a hub id
    folder: Path
    revision: str | None  # the hub commit; None for a folder
    config: ViTConfig
    preprocessor: Preprocessor
    files: tuple[Path, ...]  # the safetensors files that hold the vision model
    layout: Layout
    prefix: str  # of every tensor name of the vision model


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str  # as safetensors writes it: F32, BF16, ...
    shape: tuple[int, ...]


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint in a folder or on the hub, and checks all of it but the values.

    From the hub come `config.json`, `preprocessor_config.json`, the safetensors index and the
    safetensors files that hold the vision model, the small ones first. Raises CheckpointError
    where something is missing, unreadable, surplus, or not an InternViT; it names the file,
    key or tensor.
    """
    fetch, commit = _opener(source, revision)
    folder = fetch([CONFIG, PREPROCESSOR, INDEX])
    config, layout, prefixes, preprocessor = _read_shape(source, folder)

    names = _weight_files(source, folder, prefixes)
    fetch(names)
    headers = {name: read_header(folder / name) for name in names}
    prefix = _check_tensors(source, headers, config, layout, prefixes)
    return Checkpoint(
        source=source,
        folder=folder,
        revision=folder.name if commit else None,
        config=config,
        preprocessor=preprocessor,
        files=tuple(folder / name for name in names),
        layout=layout,
        prefix=prefix,
    )


def open_shape(source: str, revision: str | None = None) -> tuple[ViTConfig, Preprocessor]:
    """The network that a checkpoint describes, by its two JSON files; no weights are fetched.

    Raises CheckpointError as `open_checkpoint` does.
    """
    fetch, _ = _opener(source, revision)
    config, _, _, preprocessor = _read_shape(source, fetch([CONFIG, PREPROCESSOR]))
    return config, preprocessor


def _read_shape(
    source: str, folder: Path
) -> tuple[ViTConfig, Layout, tuple[str, ...], Preprocessor]:
    config, layout, prefixes = parse_config(_read_json(folder / CONFIG), f"{source}: {CONFIG}")
    preprocessor = parse_preprocessor(
        _read_json(folder / PREPROCESSOR), f"{source}: {PREPROCESSOR}"
    )
    if preprocessor.crop % config.patch_size:
        raise CheckpointError(
            f"{source}: {PREPROCESSOR}: tiles of {preprocessor.crop} pixels do not divide into "
            f"patches of {config.patch_size}"
        )
    return config, layout, prefixes, preprocessor


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of what decides the embeddings: config, preparation, and weight files.

    The same wherever the checkpoint lies and however it was fetched. Files are read side by
    side; one core takes 1-2 GB/s.
    """

    def file_digest(path: Path) -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        files = list(pool.map(file_digest, checkpoint.files))
    what = {
        "config": asdict(checkpoint.config),
        "preprocessor": asdict(checkpoint.preprocessor),
        "files": files,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _opener(source: str, revision: str | None) -> tuple[Callable[[Sequence[str]], Path], bool]:
    """How to get files of `source` into a folder, and whether that folder is a hub commit."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source}: a folder has no revision; leave out {revision!r}")
        return lambda names: path, False
    if path.exists() or path.is_absolute() or source.startswith((".", "~")):
        raise CheckpointError(f"{source}: no such folder")

    commit = revision

    def fetch(names: Sequence[str]) -> Path:
        nonlocal commit
        folder = hub.fetch(source, commit, names)
        commit = folder.name  # the later files are those of the same commit
        return folder

    return fetch, True


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder must have it") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return document


def _weight_files(source: str, folder: Path, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the safetensors files that hold the vision model, sorted."""
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles and not (folder / SINGLE).exists():
            raise CheckpointError(
                f"{source}: has {pickles[0]} but no {SINGLE}; only safetensors are read"
            )
        return (SINGLE,)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensors to .safetensors file names")
    names = {name for tensor, name in weight_map.items() if tensor.startswith(prefixes)}
    if not names:
        raise CheckpointError(f"{index}: no tensor below {' or '.join(prefixes)}")
    return tuple(sorted(names))


def read_header(path: Path) -> dict[str, Tensor]:
    """Name → dtype and shape of a safetensors file's tensors, from its first bytes.

    The format: 8 bytes little-endian length, that much JSON, then the tensors' bytes. Raises
    CheckpointError when the file is missing, cut short, or no safetensors.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prelude = stream.read(8)
            length = struct.unpack("<Q", prelude)[0] if len(prelude) == 8 else -1
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {n: Tensor(str(t["dtype"]), tuple(t["shape"])) for n, t in header.items()}
        spans = {name: tuple(t["data_offsets"]) for name, t in header.items()}
        end = max((stop for _, stop in spans.values()), default=0)
        for name, (start, stop) in spans.items():
            tensor = tensors[name]
            expected = prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
            if tensor.dtype in ITEM_BYTES and stop - start != expected:
                raise CheckpointError(
                    f"{path}: tensor {name} has {stop - start} bytes for {expected}"
                )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is corrupt") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: has {size} bytes where its header says {8 + length + end}; fetch it again"
        )
    return tensors


def _check_tensors(
    source: str,
    headers: Mapping[str, Mapping[str, Tensor]],
    config: ViTConfig,
    layout: Layout,
    prefixes: tuple[str, ...],
) -> str:
    """The prefix in use; CheckpointError where found tensors are not exactly those expected.

    Below a prefix everything counts; beside it lie other parts of the model (language model,
    projector).
    """
    found: dict[str, Tensor] = {}
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            if name in found:
                raise CheckpointError(f"{source}: tensor {name} is in {file} and in another file")
            found[name] = tensor
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in found)), prefixes[0])
    expected = tensor_shapes(config, layout, prefix)

    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{source}: tensor {_first_of(missing)} is missing")
    surplus = [name for name in found if name.startswith(prefix) and name not in expected]
    if surplus:
        raise CheckpointError(
            f"{source}: tensor {_first_of(surplus)} has no place in the network of {CONFIG}"
        )
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(tensor.shape)} where {CONFIG} "
                f"asks for {list(shape)}"
            )
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{source}: tensor {name} is {tensor.dtype}; one of {list(ITEM_BYTES)} is needed"
            )
    return prefix


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
