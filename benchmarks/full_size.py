"""Does the whole InternViT-6B-448px-V1-5 load on a machine of 24 GiB, at one rank and at two?

python -m benchmarks.full_size [--folder FOLDER] [--results FOLDER]

Writes a checkpoint of the real shape with random bfloat16 weights, four files of 11 GB together,
loads it in processes of their own, and checks one block's output against transformers' and the
whole network's at two ranks against that at one. Ends with status 1 where they differ. Then the
error of bfloat16 and fp8 through all 45 blocks, fp8 by its torch reference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from benchmarks.contenders import random_pixels
from benchmarks.memory import MIB, watch
from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from model.checkpoint import Checkpoint, open_checkpoint
from model.encoder import Encoder
from model.random_checkpoint import write_random_checkpoint
from model.ranks import ParallelEncoder
from model.reference import load_reference, reference_embeddings
from model.tensor_names import num_parameters
from model.work import V1_5

NUM_FILES = 4
MIN_COSINE = 0.9995  # of bfloat16 against float32, and of two ranks against one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where 11 GB fit [default: a temporary folder]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        run_phase(options.phase, options.folder)
        return
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tessera-6b-", dir=options.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_random_checkpoint(folder, V1_5, seed=0, dtype="bfloat16", num_files=NUM_FILES)
        written = time.perf_counter() - began
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        swapped = swap_pages()
        rows: list[tuple[Cell, ...]] = []
        for phase in ("block", "1", "2"):
            command = [sys.executable, "-m", "benchmarks.full_size", "--folder", name]
            samples = watch([*command, "--phase", phase])
            peak = max(samples, key=lambda sample: sample.total)
            anonymous = max(sample.total - sample.files for sample in samples)
            figures = json.loads((folder / f"{phase}.json").read_text())
            rows.append(
                (
                    {"block": "one block, one rank"}.get(phase, f"45 blocks, ranks: {phase}"),
                    figures["load_seconds"],
                    figures["encode_seconds"],
                    round(peak.total / MIB),
                    round(anonymous / MIB),
                )
            )
            print(rows[-1], file=sys.stderr)
        swapped = swap_pages() - swapped
        watch([*command, "--phase", "precision"])
        precision = json.loads((folder / "precision.json").read_text())
        block = cosine(folder / "block.npy", folder / "oracle.npy")
        ranks = cosine(folder / "2.npy", folder / "1.npy")
    columns = ("", "seconds to load", "seconds for a tile", "peak MiB", "of it not file pages")
    table = Table("The 6B shape in bfloat16 on this CPU", columns, tuple(rows))
    errors = Table(
        "Error of the tokens of the last block against float32, one tile of noise",
        ("", "relative error", "cosine of cls", "smallest cosine of a patch token"),
        tuple((name, *figures) for name, figures in precision.items()),
    )
    notes = [
        f"{num_parameters(V1_5):,} parameters, {NUM_FILES} files, {weights / 1e9:.2f} GB, "
        f"written in {written:.0f} s",
        f"pages swapped out meanwhile: {swapped}",
        "peak: proportional set size of the process tree; weights are pages of the mapped files, "
        "but for two ranks' parts of q, k and v, which are put together",
        f"first block against transformers' in float32: smallest cosine {block:.6f}",
        f"cls of 45 blocks, two ranks against one: cosine {ranks:.6f}",
    ]
    print(write_result("full-size", "cpu", about, [table, errors], notes, options.results))
    if min(block, ranks) < MIN_COSINE or swapped:
        sys.exit("full size: NOT as it should be; see the notes")


def run_phase(phase: str, folder: Path) -> None:
    """One load, in this process: `block` (the first block, and transformers'), or ranks."""
    checkpoint = open_checkpoint(str(folder))
    if phase == "precision":
        (folder / "precision.json").write_text(json.dumps(precision_of(checkpoint)))
        return
    tiles = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3), dtype=np.uint8)
    began = time.perf_counter()
    encoder: Encoder | ParallelEncoder
    if phase == "2":
        threads = max(1, (os.cpu_count() or 1) // 2)
        encoder = ParallelEncoder(checkpoint, 2, dtype="bfloat16", device="cpu", threads=threads)
    else:
        layer = 0 if phase == "block" else -1
        encoder = Encoder.load(checkpoint, dtype="bfloat16", device="cpu", layer=layer)
    loaded = time.perf_counter()
    features = encoder.encode(tiles)
    ended = time.perf_counter()
    if isinstance(encoder, ParallelEncoder):
        encoder.close()
    values = np.concatenate([features["cls"], features["mean"]])
    np.save(folder / f"{phase}.npy", values)
    if phase == "block":
        first = open_checkpoint(str(copy_first_block(folder)))
        oracle = load_reference(first, "float32", "cpu")
        expected = reference_embeddings(oracle, first, tiles, ("cls", "mean"))
        np.save(folder / "oracle.npy", np.concatenate([expected["cls"], expected["mean"]]))
    figures = {
        "load_seconds": round(loaded - began, 1),
        "encode_seconds": round(ended - loaded, 1),
    }
    (folder / f"{phase}.json").write_text(json.dumps(figures))


@torch.inference_mode()
def precision_of(checkpoint: Checkpoint) -> dict[str, tuple[float, float, float]]:
    """bfloat16 and fp8 → relative error, cosine of cls, smallest cosine of a patch token."""
    network = Encoder.load(checkpoint, dtype="bfloat16", device="cpu")._network
    pixels = random_pixels(checkpoint.config, 1, torch.device("cpu"))
    exact = pixels.float()
    for module in (network.embeddings, *network.encoder.layers):
        weights = {name: weight.float() for name, weight in module.named_parameters()}
        exact = functional_call(module, weights, (exact,))
    figures = {"bfloat16": _error(network(pixels), exact)}
    network.to_float8()
    figures["fp8"] = _error(network(pixels), exact)
    return figures


def _error(tokens: Tensor, exact: Tensor) -> tuple[float, float, float]:
    tokens = tokens.float()
    cosines = torch.cosine_similarity(tokens, exact, dim=-1)[0]  # [N]
    relative = (tokens - exact).norm() / exact.norm()
    return tuple(round(float(x), 6) for x in (relative, cosines[0], cosines[1:].min()))  # type: ignore[return-value]


def copy_first_block(folder: Path) -> Path:
    """A checkpoint of the first block alone, for the oracle, which reads a checkpoint whole."""
    target = folder / "first-block"
    target.mkdir()
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.startswith(("embeddings.", "encoder.layers.0.")):
                    tensors[name] = opened.get_tensor(name)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "preprocessor_config.json", target)
    return target


def cosine(one: Path, other: Path) -> float:
    """The smallest over rows."""
    a, b = np.load(one).astype(np.float64), np.load(other).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())


def swap_pages() -> int:
    """Pages swapped out since the machine started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("pswpout "):
            return int(line.split()[1])
    raise subprocess.SubprocessError("/proc/vmstat has no pswpout")


if __name__ == "__main__":
    main()
