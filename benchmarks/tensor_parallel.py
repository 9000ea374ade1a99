"""What does a model split over several GPUs cost, and what does it give?

python -m benchmarks.tensor_parallel [--device cuda|cpu] [--ranks 1,2,4,8] [--tiles N]
    [--results FOLDER]

Counted: weights of a rank, its work, and what it sends, by running one block of a rank without data
(on torch's meta device). Measured: that block, rank 0's, on one device, where a sum over the ranks
is rank 0's own part. Modelled: the sums, as rings that nothing overlaps:

    seconds = 2 (N - 1) / N · bytes / bus bandwidth + 2 (N - 1) · latency of a step

which is NCCL's own model (NVIDIA/nccl, src/graph/tuning.cc; "bus bandwidth" as in nccl-tests'
doc/PERFORMANCE.md). torch alone, no Ray. Counted is InternViT-6B-448px-V1-5 in any case; measured
on a CPU is a small model, which shows that this program works and nothing else.

Links, each way: what the line carries, and what a ring reaches of it (the bus bandwidth here).
- NVLink 4 (H100, H200): 900 GB/s both ways, 450 each way; 370 at large sizes in a ring
  (NVIDIA/nccl-tests issue 212, a maintainer). 360 is taken. With NVLink SHARP sums over 8 GPUs come
  to 480 (the same): left out.
- NVLink 3 (A100): 600 GB/s both ways, 300 each way; 232.5 measured on 8 GPUs (NVIDIA/nccl-tests
  issue 175), at most 235 in tuning.cc. 230 is taken.
- PCIe 5 x16: 64 GB/s each way, PCIe 4 x16: 32 (PCI-SIG). 50 and 25 are taken: what the protocol
  leaves between two GPUs below one switch. Across CPUs it is less: 35 on 4 and 28 on 8 GPUs of
  PCIe 5 (NVIDIA/nccl issue 1639).
- Latency of a step: 3.4 µs over NVLink, 5.7 over PCIe (tuning.cc: hwLat, ring, Simple).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import random_weights
from benchmarks.dataset import SMALL_MODEL
from benchmarks.record import RESULTS, Cell, Table, machine, write_result
from benchmarks.timing import (
    GIB,
    SEED,
    TERA,
    Speed,
    device_name,
    find_device,
    numbers,
    short,
    take_turns,
)
from model import attention as kernels
from model.config import ViTConfig
from model.group import ALONE, Group
from model.intern_vit import Block, Embeddings
from model.split import check_ranks, head_span, mlp_span
from model.work import V1_5, block_flop, ring_seconds, sum_bytes

GIGA, MEGA = 1e9, 1e6
ROUNDS, PASSES = 7, 4  # of each block, and of a round
V1_5_RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Link:
    name: str
    bandwidth: float  # bytes a second each way, as a ring reaches them
    latency: float  # seconds of a step

    def seconds(self, num_bytes: float, ranks: int) -> float:
        """Of one sum of so many bytes over the ranks."""
        return ring_seconds(num_bytes, ranks, self.bandwidth, self.latency)


LINKS = (
    Link("NVLink 4", 360 * GIGA, 3.4e-6),
    Link("NVLink 3", 230 * GIGA, 3.4e-6),
    Link("PCIe 5 x16", 50 * GIGA, 5.7e-6),
    Link("PCIe 4 x16", 25 * GIGA, 5.7e-6),
)


@dataclass(frozen=True)
class Share:
    """One rank's part of a model in bfloat16."""

    num_heads: int
    num_columns: int
    weight_bytes: int
    flop: int  # of a block and tile
    sums: tuple[int, ...]  # bytes of each sum over the ranks, of a block and tile


def main() -> None:
    parser = argparse.ArgumentParser(description="A split model: work, traffic, and speed.")
    parser.add_argument("--device", type=find_device, default="auto", help="cuda, cpu [auto]")
    parser.add_argument("--ranks", type=numbers, default=(1, 2, 4, 8), help="[1,2,4,8]")
    parser.add_argument("--tiles", type=int, help="of a pass [32; on a CPU 1]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    device = options.device
    about = machine()
    config = V1_5 if device.type == "cuda" else SMALL_MODEL
    sizes = [size for size in options.ranks if size <= config.num_heads]
    batch = options.tiles or (32 if device.type == "cuda" else 1)
    tables, notes = run(config, sizes, batch, device)
    if left_out := set(options.ranks) - set(sizes):
        notes.append(f"left out, for want of heads: {sorted(left_out)} ranks")
    print(
        write_result("tensor-parallel", device_name(device), about, tables, notes, options.results)
    )


def run(
    config: ViTConfig, sizes: Sequence[int], batch: int, device: torch.device
) -> tuple[list[Table], list[str]]:
    """Tables and notes. The largest share of each size counts: the others wait for it."""
    shares = {size: largest_share(config, size) for size in sizes}
    shape = (16, config.num_tokens, config.num_heads, config.head_dim)
    choice = kernels.resolve("auto", device, torch.bfloat16, shape)
    speeds = measure_blocks(config, sizes, batch, choice, device)
    tables = [
        _share_table("InternViT-6B", {size: largest_share(V1_5, size) for size in V1_5_RANKS}),
        *([] if config == V1_5 else [_share_table("the small model", shares)]),
        _block_table(shares, speeds),
        _model_table(config, shares, speeds),
    ]
    notes = [
        f"{config.num_layers} blocks, hidden {config.hidden_size}, {config.num_heads} heads, MLP "
        f"{config.intermediate_size}, {config.image_size} pixels; bfloat16; random weights",
        "counted on one block of every rank without data, and equal to the formulas of block_flop "
        "and sum_bytes",
        f"measured: {batch} tiles, medians of {ROUNDS} samples of {PASSES} passes in turns; "
        f"attention {choice.name}; a sum over the ranks leaves rank 0's part as it is, outside the "
        "compiled code like the real one",
        "modelled: rings that nothing overlaps; of the network the blocks alone, without the patch "
        "embedding, which every rank computes, and NCCL's time to start",
        "links: "
        + ", ".join(
            f"{link.name} {link.bandwidth / GIGA:g} GB/s and {link.latency * 1e6:g} µs a step"
            for link in LINKS
        ),
    ]
    return tables, notes


def share_of(config: ViTConfig, rank: int, size: int) -> Share:
    """Counted on one block of the rank as it runs, without data."""
    sums: list[int] = []

    def all_reduce(x: Tensor) -> Tensor:
        sums.append(x.nbytes)
        return x

    with torch.device("meta"), torch.inference_mode():
        block = Block(config, kernels.sdpa, Group(rank, size, all_reduce)).bfloat16()
        embeddings = Embeddings(config).bfloat16()
        tokens = torch.empty(1, config.num_tokens, config.hidden_size, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            assert block(tokens).shape == tokens.shape
    block_bytes, embedding_bytes = (
        sum(parameter.nbytes for parameter in module.parameters()) for module in (block, embeddings)
    )
    (first, last), (left, right) = head_span(config, rank, size), mlp_span(config, rank, size)
    return Share(
        num_heads=last - first,
        num_columns=right - left,
        weight_bytes=embedding_bytes + config.num_layers * block_bytes,
        flop=counter.get_total_flops(),
        sums=tuple(sums),
    )


def largest_share(config: ViTConfig, size: int) -> Share:
    """The share of the rank with most to do. Raises UserError where there are too few heads."""
    check_ranks(config, size)
    shares = [share_of(config, rank, size) for rank in range(size)]
    for share in shares:
        assert share.flop == block_flop(config, share.num_heads, share.num_columns)
        assert share.sums == sum_bytes(config)
    return max(shares, key=lambda share: share.flop)


def measure_blocks(
    config: ViTConfig,
    sizes: Sequence[int],
    batch: int,
    choice: kernels.Choice,
    device: torch.device,
) -> dict[int, Speed | str]:
    """Rank 0's block of each size, in turns; or why there is no figure."""
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (batch, config.num_tokens, config.hidden_size)
    tokens = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
    blocks = {str(size): rank_block(config, size, choice, device) for size in sizes}
    with torch.inference_mode():
        works = {name: partial(block, tokens) for name, block in blocks.items()}
        found = take_turns(works, batch, rounds=ROUNDS, least_tiles=PASSES * batch, device=device)
    return {size: found[str(size)] for size in sizes}


# Disabled as model.group's own, so that the code is compiled in the same pieces.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _own_part(x: Tensor) -> Tensor:
    return x


def rank_block(config: ViTConfig, size: int, choice: kernels.Choice, device: torch.device) -> Block:
    """Rank 0's block with random weights on the device; compiled on a GPU."""
    group = ALONE if size == 1 else Group(0, size, _own_part)
    with torch.device("meta"):
        block = Block(config, kernels.kernel(choice.name), group)
    prefix = "encoder.layers.0."
    shapes = {prefix + name: tuple(empty.shape) for name, empty in block.state_dict().items()}
    weights = random_weights(shapes, device)
    block.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items()}, assign=True)
    block.requires_grad_(False).eval()
    if device.type == "cuda":
        block.compile(dynamic=True)
    return block


def _share_table(model: str, shares: Mapping[int, Share]) -> Table:
    whole = shares[1].flop if 1 in shares else None

    def row(size: int, share: Share) -> tuple[Cell, ...]:
        return (
            size,
            share.num_heads,
            share.num_columns,
            short(share.weight_bytes / GIB),
            short(share.flop / GIGA),
            whole and round(100 * share.flop / whole, 1),
            short(sum(share.sums) / MEGA),
            short(2 * (size - 1) / size * sum(share.sums) / MEGA),
        )

    return Table(
        f"The largest rank of {model}: its weights, and of a block and tile its work and traffic",
        (
            "ranks",
            "heads",
            "MLP columns",
            "weights, GiB",
            "GFLOP",
            "of the whole %",
            "summed, MB",
            "sent, MB",
        ),
        tuple(row(size, share) for size, share in shares.items()),
    )


def _block_table(shares: Mapping[int, Share], speeds: Mapping[int, Speed | str]) -> Table:
    def cells(share: Share, speed: Speed | str) -> tuple[Cell, ...]:
        if isinstance(speed, str):
            return (speed, None, None)
        return (
            short(1000 * speed.median),
            f"{1000 * min(speed.seconds):.4g}-{1000 * max(speed.seconds):.4g}",
            short(share.flop * speed.tiles_per_second / TERA),
        )

    return Table(
        "A block of the largest rank on this device",
        ("ranks", "ms", "min-max", "TFLOP/s"),
        tuple((size, *cells(shares[size], speed)) for size, speed in speeds.items()),
    )


def _model_table(
    config: ViTConfig, shares: Mapping[int, Share], speeds: Mapping[int, Speed | str]
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for size, speed in speeds.items():
        if isinstance(speed, str):
            continue
        work = config.num_layers * speed.median / speed.batch
        for link in LINKS if size > 1 else (None,):
            sums = 0.0
            if link is not None:
                sums = config.num_layers * sums_seconds(link, shares[size], size, speed.batch)
            rows.append(
                (
                    size,
                    link.name if link is not None else None,
                    short(1000 * work),
                    short(1000 * sums),
                    short(1 / (work + sums)),
                    short(1 / (work + sums) / size),
                )
            )
    return Table(
        "The whole model over links, modelled",
        ("ranks", "link", "ms of work a tile", "ms of sums a tile", "tiles/s", "tiles/s a GPU"),
        tuple(rows),
    )


def sums_seconds(link: Link, share: Share, size: int, batch: int) -> float:
    """Of a block and tile, where `batch` tiles travel together."""
    return sum(link.seconds(batch * num_bytes, size) for num_bytes in share.sums) / batch


if __name__ == "__main__":
    main()
