"""How close does the network come to what its device can do?

python -m benchmarks.encoder [--device cuda|cpu] [--batches 8,16,32,64,128] [--blocks N]
    [--rounds N] [--profile] [--results FOLDER]

torch alone, no Ray. On a GPU it is the whole InternViT-6B-448px-V1-5 with random weights that are
made on the device; on a CPU a small model, which shows that this program works and nothing else.

Contenders take turns, round by round, so that a device that slows down slows all of them. What runs
out of memory or fails is a cell that says so; the rest goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from benchmarks.contenders import (
    OURS,
    OURS_FP8,
    THEIRS,
    Contender,
    build,
    float32_tokens,
    our_network,
    random_pixels,
    random_weights,
)
from benchmarks.dataset import SMALL_MODEL
from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result
from benchmarks.timing import (
    GIB,
    SEED,
    TERA,
    Product,
    ProductShape,
    Speed,
    attempt,
    device_name,
    find_device,
    log,
    numbers,
    products,
    short,
    take_turns,
)
from model import attention as kernels
from model.checkpoint import Checkpoint
from model.config import Preprocessor, ViTConfig
from model.encoder import Encoder
from model.group import ALONE
from model.random_checkpoint import MEAN, STD
from model.tensor_names import parameter_shapes
from model.work import V1_5, tile_flop

ERROR_TILES = 2
USUAL_BATCH = 32  # of the first result and of the profile
PROFILE_ROWS = 20
# For one H200 and the whole model.
AIM_OF_CEILING, AIM_OF_THEIRS, AIM_OF_BFLOAT16, AIM_COSINE = 0.85, 1.25, 1.5, 0.999

# Of a contender at each batch size: figures, or the reason why there are none.
Speeds = Mapping[str, Sequence[Speed | str]]
# FLOP/s of matrix products.
Ceiling = Mapping[tuple[Product, ProductShape], float]


@dataclass(frozen=True)
class Settings:
    """What is measured; a cell is `rounds` samples of at least `sample_tiles` tiles each."""

    config: ViTConfig
    device: torch.device
    batches: tuple[int, ...]
    rounds: int
    sample_tiles: int
    chunk_tiles: int  # of a call of `encode`
    product_tiles: int  # whose tokens are the rows of the products that make the ceiling
    squares: tuple[int, ...]  # edges of further products
    product_calls: int  # of a sample

    @classmethod
    def of(cls, device: torch.device) -> Settings:
        if device.type == "cuda":
            return cls(V1_5, device, (8, 16, 32, 64, 128), 5, 32, 128, 32, (8192, 16384), 10)
        return cls(SMALL_MODEL, device, (1, 2, 4), 3, 1, 8, 4, (512,), 1)


@dataclass(frozen=True)
class Accuracy:
    """Against float32, over all tokens: |x - y| / |y|, and the smallest cosine of a token."""

    relative_error: float
    cls_cosine: float
    patch_cosine: float


def main() -> None:
    parser = argparse.ArgumentParser(description="The network alone, against its device.")
    parser.add_argument("--device", type=find_device, default="auto", help="cuda, cpu [auto]")
    parser.add_argument("--batches", type=numbers, help="[8,16,32,64,128; on a CPU 1,2,4]")
    parser.add_argument("--blocks", type=int, help="[45; on a CPU 2]")
    parser.add_argument("--rounds", type=int, help="samples of each cell [5; on a CPU 3]")
    parser.add_argument("--profile", action="store_true", help=f"list the kernels of {OURS}")
    parser.add_argument("--first-result", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    device = options.device
    settings = Settings.of(device)
    settings = replace(
        settings,
        batches=options.batches or settings.batches,
        rounds=options.rounds or settings.rounds,
        config=replace(settings.config, num_layers=options.blocks or settings.config.num_layers),
    )
    if options.first_result:
        first_result(settings)
        return
    about = machine()
    command = [sys.executable, "-m", "benchmarks.encoder", "--first-result"]
    command += ["--device", device.type, "--blocks", str(settings.config.num_layers)]
    first = attempt(first_results, command)  # before this process takes the memory
    tables, notes = run(settings, options.profile)
    notes.append(
        f"first {settings.chunk_tiles} tiles' features after the start of a process, with imports, "
        "weights made on the device, choice of attention and compiling: "
        + (first if isinstance(first, str) else "{:.1f} s; again: {:.1f} s".format(*first))
    )
    print(write_result("encoder", device_name(device), about, tables, notes, options.results))


def run(settings: Settings, profiled: bool = False) -> tuple[list[Table], list[str]]:
    """All but the first result: tables and notes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config, device = settings.config, settings.device
    choice = resolve_attention(settings)
    contenders, notes = build(config, device, choice)
    before = measure_products(settings)
    log(f"attention: {choice}; products, FLOP/s: {before}")
    accuracies = measure_accuracy(contenders, settings)
    speeds = measure_speeds(contenders, settings)
    after = measure_products(settings)
    ceiling = {which: max(before[which], after[which]) for which in before}
    tables = [
        _speed_table(contenders, speeds, ceiling, settings),
        _accuracy_table(accuracies),
        _chunk_table(measure_encode(contenders, speeds, choice, settings), settings),
        _ceiling_table(before, after),
    ]
    if profiled:
        kernel_table = attempt(profile, next(c for c in contenders if c.name == OURS), settings)
        if isinstance(kernel_table, str):
            notes.append(f"no profile: {kernel_table}")
        else:
            tables.append(kernel_table)
    timings = ", ".join(f"{name} {took:.3f} ms" for name, took in choice.milliseconds.items())
    notes += [
        f"{config.num_layers} blocks, hidden {config.hidden_size}, {config.num_heads} heads, MLP "
        f"{config.intermediate_size}, {config.image_size} pixels: {tile_flop(config) / TERA:.4g} "
        "TFLOP a tile in linear layers, attention and patch embedding; random weights and pixels",
        f"medians of {settings.rounds} samples in turns, each of one pass or as many as make "
        f"{settings.sample_tiles} tiles",
        f"attention of ours: {choice.name} ({timings or 'the only one here'})",
        "share: of the fastest product of the contender's kind, of those before and after",
        "memory: the contender's weights, activations and pixels",
        f"errors: {ERROR_TILES} tiles, against transformers in float32 without TF32, same weights",
        *verdicts(speeds, accuracies, ceiling, config, device),
    ]
    return tables, notes


def resolve_attention(settings: Settings) -> kernels.Choice:
    config = settings.config
    shape = (16, config.num_tokens, config.num_heads, config.head_dim)
    return kernels.resolve("auto", settings.device, torch.bfloat16, shape)


# -- measuring


def measure_products(settings: Settings) -> Ceiling:
    """Of the model's own shapes, and of squares."""
    config = settings.config
    D, M = config.hidden_size, config.intermediate_size
    rows = settings.product_tiles * config.num_tokens
    shapes = [(rows, D, 3 * D), (rows, D, D), (rows, D, M), (rows, M, D)]
    shapes += [(edge, edge, edge) for edge in settings.squares]
    return products(
        shapes, rounds=settings.rounds, calls=settings.product_calls, device=settings.device
    )


@torch.inference_mode()
def measure_accuracy(
    contenders: Sequence[Contender], settings: Settings
) -> dict[str, Accuracy | str]:
    """Each contender against transformers' network in float32, or why there is no figure."""
    pixels = random_pixels(settings.config, ERROR_TILES, settings.device)
    theirs = next(contender.module for contender in contenders if contender.name == THEIRS)
    reference = attempt(float32_tokens, theirs, pixels)
    if isinstance(reference, str):
        return {contender.name: f"float32: {reference}" for contender in contenders}

    def compare(contender: Contender) -> Accuracy:
        tokens = contender.forward(pixels).float()
        cosines = F.cosine_similarity(tokens, reference, dim=-1)  # [b, N]
        error = torch.linalg.vector_norm(tokens - reference) / torch.linalg.vector_norm(reference)
        return Accuracy(float(error), float(cosines[:, 0].min()), float(cosines[:, 1:].min()))

    found = {contender.name: attempt(compare, contender) for contender in contenders}
    log(str(found))
    return found


@torch.inference_mode()
def measure_speeds(contenders: Sequence[Contender], settings: Settings) -> Speeds:
    found: dict[str, list[Speed | str]] = {contender.name: [] for contender in contenders}
    for batch in settings.batches:
        pixels = attempt(random_pixels, settings.config, batch, settings.device)
        if isinstance(pixels, str):
            turns: dict[str, Speed | str] = dict.fromkeys(found, pixels)
        else:
            works = {c.name: partial(c.forward, pixels) for c in contenders}
            turns = take_turns(
                works,
                batch,
                rounds=settings.rounds,
                least_tiles=settings.sample_tiles,
                device=settings.device,
            )
        for name, speed in turns.items():
            log(f"{name}, batch {batch}: {speed}")
            found[name].append(speed)
    return found


def measure_encode(
    contenders: Sequence[Contender], speeds: Speeds, choice: kernels.Choice, settings: Settings
) -> dict[str, Speed | str]:
    """`Encoder.encode` of a chunk of tiles in host memory, at each network's best batch size.

    With the copies, normalising and pooling.
    """
    tiles = _random_tiles(settings)
    works = {
        contender.name: partial(make_encoder(contender, best.batch, choice, settings).encode, tiles)
        for contender in contenders
        if contender.name in (OURS, OURS_FP8)
        and (best := _best(speeds.get(contender.name, ()))) is not None
    }
    return take_turns(
        works, len(tiles), rounds=settings.rounds, least_tiles=0, device=settings.device
    )


def make_encoder(
    contender: Contender, batch: int, choice: kernels.Choice, settings: Settings
) -> Encoder:
    """The public encoder around a network that is on the device already."""
    config = settings.config
    (r, g, b), (std_r, std_g, std_b) = MEAN, STD
    side = config.image_size
    preprocessor = Preprocessor(side, side, (r, g, b), (std_r, std_g, std_b))
    return Encoder(
        contender.module,
        Checkpoint("random", Path(), None, config, preprocessor, (), "remote-code", ""),
        dtype=contender.product,
        device=settings.device,
        features=("cls", "mean"),
        embedding_dtype="float32",
        batch_tiles=batch,
        attention=choice,
        group=ALONE,
    )


def _random_tiles(settings: Settings) -> npt.NDArray[np.uint8]:
    """uint8 [n, S, S, 3]"""
    side = settings.config.image_size
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 256, (settings.chunk_tiles, side, side, 3), dtype=np.uint8)


def first_results(command: Sequence[str]) -> tuple[float, float]:
    """Seconds from the start of a process to its first features, which it prints the time of.

    First with nothing compiled before, then with what that run has compiled.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}

        def seconds() -> float:
            began = time.time()
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **caches},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            return float(done.stdout.split()[-1]) - began

        return seconds(), seconds()


def first_result(settings: Settings) -> None:
    config = settings.config
    choice = resolve_attention(settings)
    weights = random_weights(parameter_shapes(config), settings.device)
    network = our_network(config, weights, choice)
    if settings.device.type == "cuda":
        network.compile_blocks()
    contender = Contender(OURS, "bfloat16", network, network)
    make_encoder(contender, USUAL_BATCH, choice, settings).encode(_random_tiles(settings))
    print(time.time())


@torch.inference_mode()
def profile(contender: Contender, settings: Settings) -> Table:
    """Kernels of one pass (on a CPU torch's operators), those that take longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_cuda = settings.device.type == "cuda"
    batch = min(settings.batches, key=lambda batch: abs(batch - USUAL_BATCH))
    pixels = random_pixels(settings.config, batch, settings.device)
    contender.forward(pixels)
    with record(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as trace:
        contender.forward(pixels)
        if on_cuda:
            torch.cuda.synchronize()
    kind, took = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    events: Any = trace.key_averages()
    listed = sorted(
        (
            (getattr(event, took) / 1000, event.count, event.key[:100].replace("|", "/"))
            for event in events  # microseconds
            if event.device_type.name == kind and not event.is_user_annotation
        ),
        reverse=True,
    )
    total = sum(milliseconds for milliseconds, _, _ in listed)
    return Table(
        f"{contender.name}, one pass of {batch} tiles: {total:.4g} ms of kernels, the longest",
        ("kernel", "calls", "ms", "share %"),
        tuple(
            (name, calls, short(milliseconds), short(100 * milliseconds / total))
            for milliseconds, calls, name in listed[:PROFILE_ROWS]
        ),
    )


# -- telling


def _best(speeds: Sequence[Speed | str]) -> Speed | None:
    """The fastest of a contender's batch sizes; None where none ran."""
    ran = [speed for speed in speeds if isinstance(speed, Speed)]
    return max(ran, key=lambda speed: speed.tiles_per_second, default=None)


def _highest(ceiling: Ceiling, product: Product) -> float:
    """FLOP/s of the fastest product of a kind."""
    return max(flops for (kind, _), flops in ceiling.items() if kind == product)


def verdicts(
    speeds: Speeds,
    accuracies: Mapping[str, Accuracy | str],
    ceiling: Ceiling,
    config: ViTConfig,
    device: torch.device,
) -> list[str]:
    """Which aims are met, each contender at its best batch size."""
    ours, theirs, float8 = (_best(speeds.get(name, ())) for name in (OURS, THEIRS, OURS_FP8))

    def verdict(what: str, found: float | None, aim: float) -> str:
        if found is None:
            return f"not measured: {what} >= {aim}"
        if config != V1_5 or device.type != "cuda":
            return f"not judged, as this is not the 6B on a GPU: {what} >= {aim}: {found:.4g}"
        return f"{'met' if found >= aim else 'MISSED'}: {what} >= {aim}: {found:.4g}"

    def ratio(first: Speed | None, second: Speed | None) -> float | None:
        if first is None or second is None:
            return None
        return first.tiles_per_second / second.tiles_per_second

    share = None
    if ours is not None:
        share = ours.tiles_per_second * tile_flop(config) / _highest(ceiling, "bfloat16")
    error = accuracies.get(OURS_FP8)
    cosine = min(error.cls_cosine, error.patch_cosine) if isinstance(error, Accuracy) else None
    return [
        verdict(f"{OURS} / the bfloat16 ceiling", share, AIM_OF_CEILING),
        verdict(f"{OURS} / {THEIRS}", ratio(ours, theirs), AIM_OF_THEIRS),
        verdict(f"{OURS_FP8} / {OURS}", ratio(float8, ours), AIM_OF_BFLOAT16),
        verdict(f"smallest cosine of {OURS_FP8}", cosine, AIM_COSINE),
    ]


def _speed_table(
    contenders: Sequence[Contender],
    speeds: Speeds,
    ceiling: Ceiling,
    settings: Settings,
) -> Table:
    config = settings.config
    pixel_bytes = 2 * 3 * config.image_size**2

    def row(contender: Contender, batch: int, speed: Speed | str) -> tuple[Cell, ...]:
        if isinstance(speed, str):
            return (contender.name, batch, speed, *[None] * 5)
        flops = speed.tiles_per_second * tile_flop(config)
        memory = None
        if speed.activation_bytes is not None:
            memory = contender.weight_bytes + speed.activation_bytes + batch * pixel_bytes
        return (
            contender.name,
            batch,
            short(1000 * speed.median),
            f"{1000 * min(speed.seconds):.4g}-{1000 * max(speed.seconds):.4g}",
            short(speed.tiles_per_second),
            short(flops / TERA),
            round(100 * flops / _highest(ceiling, contender.product), 1),
            memory and round(memory / GIB, 2),
        )

    columns = ("", "batch", "ms", "min-max", "tiles/s", "TFLOP/s", "share %", "memory, GiB")
    return Table(
        "The network: normalised pixels on the device to tokens",
        columns,
        tuple(
            row(contender, batch, speed)
            for contender in contenders
            for batch, speed in zip(settings.batches, speeds[contender.name], strict=True)
        ),
    )


def _accuracy_table(accuracies: Mapping[str, Accuracy | str]) -> Table:
    def cells(found: Accuracy | str) -> tuple[Cell, ...]:
        if isinstance(found, str):
            return (found, None, None)
        cosines = (round(found.cls_cosine, 6), round(found.patch_cosine, 6))
        return (float(f"{found.relative_error:.3g}"), *cosines)

    columns = ("", "relative error", "smallest cosine, cls", "smallest cosine, patches")
    rows = tuple((name, *cells(found)) for name, found in accuracies.items())
    return Table("Error against float32", columns, rows)


def _chunk_table(chunks: Mapping[str, Speed | str], settings: Settings) -> Table:
    def cells(speed: Speed | str) -> tuple[Cell, ...]:
        if isinstance(speed, str):
            return (speed, None)
        return (short(speed.tiles_per_second), short(speed.median))

    title = f"`encode` of {settings.chunk_tiles} uint8 tiles in host memory, best batch"
    rows = tuple((name, *cells(speed)) for name, speed in chunks.items())
    return Table(title, ("", "tiles/s", "seconds"), rows)


def _ceiling_table(before: Ceiling, after: Ceiling) -> Table:
    return Table(
        "The device's own matrix products",
        ("product", "rows x inner x out", "TFLOP/s before", "TFLOP/s after"),
        tuple(
            (
                kind,
                " x ".join(map(str, shape)),
                *(short(of[kind, shape] / TERA) for of in (before, after)),
            )
            for kind, shape in before
        ),
    )


if __name__ == "__main__":
    main()
