"""What tests share: tiny tars, pictures, checkpoints, and the command line as users start it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.random_checkpoint import write_random_checkpoint
from tests.checkpoints import tiny_config

REPOSITORY = Path(__file__).parents[1]
MTIME = 1_600_000_000
Members = Iterable[tuple[str, bytes]]


def picture(width: int, height: int, seed: int = 0, kind: str = "JPEG") -> bytes:
    """An encoded RGB picture of seeded noise in patches of 8 pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def tar_bytes(members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar archive of (name, content); the same input gives the same bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mtime = MTIME
            archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def sample(key: str, image: bytes, caption: str = "", **fields: Any) -> list[tuple[str, bytes]]:
    """The members img2dataset writes for a picture: jpg, txt, json."""
    return [
        (f"{key}.jpg", image),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"key": key, **fields}).encode()),
    ]


def samples(num: int, seed: int = 0, prefix: str = "") -> list[tuple[str, bytes]]:
    """Members of `num` samples with keys `<prefix>0000`…, pictures of 40 to 200 pixels a side."""
    rng = np.random.default_rng(seed)
    members: list[tuple[str, bytes]] = []
    for index in range(num):
        width, height = (int(side) for side in rng.integers(40, 200, 2))
        image = picture(width, height, seed=1000 * seed + index)
        key = f"{prefix}{index:04d}"
        members += sample(key, image, f"caption {key}", url=f"u/{key}")
    return members


def write_checkpoint(folder: Path, kind: str = "rms_norm", image_size: int = 56) -> Path:
    """A random checkpoint of 3 blocks, 5 heads, hidden size 80, patch 14."""
    write_random_checkpoint(folder, tiny_config(kind, image_size), seed=0)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content, of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_cli(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """`tessera <arguments>` in its own process, on a Ray of its own."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=cli_env(env),
    )


def cli_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of `run_cli`, for tests that start the process themselves."""
    return {
        **os.environ,
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(REPOSITORY),
        **(env or {}),
    }
