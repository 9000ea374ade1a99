"""Which part of every parameter a tensor-parallel rank holds. Pure functions: no torch, no files.

Legend: D hidden size, M intermediate size, d = D / heads the size of a head.

Megatron-LM's split (arXiv 1909.08053, section 3): a rank has some heads of the attention and some
columns of the MLP; the layers behind them (`proj`, `fc2`) give partial sums that are added up over
the ranks. Everything else is whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ViTConfig
from model.errors import UserError

Span = tuple[int, int]  # start, stop
ALIGNMENT = (
    16  # columns of the MLP stay together: matrix products want multiples of it, fp8 needs it
)


@dataclass(frozen=True)
class Part:
    """The spans of a parameter along `dim`, one behind the other; the whole where `dim` is None."""

    dim: int | None = None
    spans: tuple[Span, ...] = ()


WHOLE = Part()


def check_ranks(config: ViTConfig, size: int) -> None:
    """Raises UserError where a model cannot be split over `size` ranks."""
    if not 1 <= size <= config.num_heads:
        raise UserError(
            f"tensor_parallel: {size}; the checkpoint has {config.num_heads} heads: "
            f"use 1 to {config.num_heads}"
        )


def even_span(total: int, rank: int, size: int) -> Span:
    """`total` things over `size` ranks as evenly as they go, the larger shares first."""
    share, extra = divmod(total, size)
    start = rank * share + min(rank, extra)
    return start, start + share + (rank < extra)


def head_span(config: ViTConfig, rank: int, size: int) -> Span:
    return even_span(config.num_heads, rank, size)


def mlp_span(config: ViTConfig, rank: int, size: int) -> Span:
    """Columns of the MLP, in units of ALIGNMENT where there are enough of those."""
    units, rest = divmod(config.intermediate_size, ALIGNMENT)
    if rest or units < size:
        return even_span(config.intermediate_size, rank, size)
    start, stop = even_span(units, rank, size)
    return start * ALIGNMENT, stop * ALIGNMENT


def part_of(parameter: str, config: ViTConfig, rank: int, size: int) -> Part | None:
    """The part of one of our parameters that a rank holds; None where it holds nothing of it.

    The bias of a layer whose outputs are added up over the ranks is on rank 0 alone, or it would
    be added once for each rank.
    """
    if size == 1:
        return WHOLE
    D = config.hidden_size
    heads = tuple(head * config.head_dim for head in head_span(config, rank, size))
    columns = mlp_span(config, rank, size)
    match parameter.rpartition("layers.")[2].partition(".")[2]:
        case "attn.qkv.weight" | "attn.qkv.bias":
            return Part(0, tuple((i * D + heads[0], i * D + heads[1]) for i in range(3)))
        case "attn.q_norm.weight" | "attn.k_norm.weight":
            return Part(0, ((heads[0], heads[1]),))
        case "attn.proj.weight":
            return Part(1, ((heads[0], heads[1]),))
        case "mlp.fc1.weight" | "mlp.fc1.bias":
            return Part(0, (columns,))
        case "mlp.fc2.weight":
            return Part(1, (columns,))
        case "attn.proj.bias" | "mlp.fc2.bias":
            return WHOLE if rank == 0 else None
    return WHOLE
