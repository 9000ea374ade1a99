"""Do autofaiss, embedding-reader and clip-retrieval's back end take `format: npy` as it is?

    make npy-readers

They need numpy 1 and pyarrow 15, so they live in an environment of their own, and
`npy_readers_check.py` runs there.

python -m benchmarks.npy_readers PYTHON_OF_THAT_ENVIRONMENT [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.record import RESULTS, Table, machine, write_result
from pipeline.chunks import TileSettings
from pipeline.commits import Commit
from pipeline.formats import part_tables
from pipeline.records import Shape, Shard
from pipeline.samples import ReadSettings
from pipeline.vectors import feature_values
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import picture, sample, write_tar
from tests.stages import IMAGE_KEY, STORAGE, TILING, compute_shard, part_settings

WIDTH = 32
CARRY = ("txt", "json:url")
# Nested names, names that sort otherwise before `.npy` than `.parquet`, one of rejects alone.
SHARDS = {"a": 9, "a.o": 7, "a/b": 8, "a-x": 5, "z/y/x": 11, "nothing": 0}
AGAIN = "a/b"  # published a second time: its objects have the suffix of a generation
CHECK = Path(__file__).with_name("npy_readers_check.py")


def encode(tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """Vectors of length 1, each its tile's own: by inner product the nearest is itself."""
    vectors = {}
    for name in ("cls", "mean"):
        rows = []
        for tile in tiles:
            seed = int.from_bytes(tile.tobytes()[:48:3], "little") + len(name)
            row = np.random.default_rng(seed).normal(size=WIDTH)
            rows.append(row / np.linalg.norm(row))
        vectors[name] = np.asarray(rows, np.float32)
    return vectors


def make_output(folder: Path, features: tuple[str, ...]) -> dict[str, npt.NDArray[np.floating]]:
    """An OUTPUT in the format, in parts; gives each feature as the commits tell it, and `name`, the
    caption and tile of each row."""
    shapes: dict[str, Shape] = dict.fromkeys(features, WIDTH)
    parts = part_settings(folder / "out", shapes, carry=CARRY, format="npy")
    settings = FinalizeSettings(parts, "f" * 64, 2500)
    tables: list[pa.Table] = []
    for number, (name, count) in enumerate(SHARDS.items()):
        seeds = range(1000 * number, 1000 * number + count)
        members = [
            member
            for seed in seeds
            for member in sample(
                f"{seed:05}", picture(60 + seed % 90, 50, seed), f"{name} {seed}", url=f"u/{seed}"
            )
        ]
        source = write_tar(folder / f"{number}.tar", members or [("0.jpg", b"no picture")])
        read, tile = ReadSettings(STORAGE, IMAGE_KEY, CARRY), TileSettings(TILING, CARRY, 60.0, 6)
        commit: Commit | None = None
        for _ in range(2 if name == AGAIN else 1):
            whole = compute_shard(Shard(str(source), name), read, tile, encode, parts)
            commit = finalize_shard(whole, settings, commit)
        assert commit is not None
        for part in commit.parts:
            tables += part_tables(part, parts.output, parts.layout, STORAGE)
    rows = pa.concat_tables(tables)
    expected = {name: feature_values(rows[name], WIDTH) for name in features}
    names = zip(rows["txt"].to_pylist(), rows["tile_index"].to_pylist(), strict=True)
    return {**expected, "name": np.array([f"{caption} {tile}" for caption, tile in names])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="interpreter of the environment that has those packages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    rows = []
    versions: dict[str, str] = {}
    for features in (("cls",), ("cls", "mean")):
        with tempfile.TemporaryDirectory(prefix="tessera-npy-") as name:
            folder = Path(name)
            expected = make_output(folder, features)
            np.savez(folder / "expected.npz", **expected)  # type: ignore[arg-type]
            command = [options.python, str(CHECK), str(folder), ",".join(features)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
        versions = found["versions"]
        rows += [("+".join(features), what, count) for what, count in found["checks"].items()]
    table = Table(
        "What the packages read, compared with what the commits hold",
        ("features", "check", "vectors that agree, all of them"),
        tuple(rows),
    )
    notes = [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"shards {', '.join(SHARDS)}: nested, cut into parts, {AGAIN} in its second generation, "
        "`nothing` of rejects alone",
        "clip-retrieval: its clip_index and, over HTTP, its KnnService as they are; queries are "
        "vectors (embedding_input), so no CLIP model is loaded, and torch is not installed there",
    ]
    print(write_result("npy-readers", "cpu", about, [table], notes, options.results))


if __name__ == "__main__":
    main()
