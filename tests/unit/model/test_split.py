"""The slices of every parameter over any number of ranks: together the whole, nothing twice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model.checkpoint import open_checkpoint
from model.config import Layout, ViTConfig
from model.encoder import read_weights
from model.errors import UserError
from model.random_checkpoint import write_random_checkpoint
from model.split import WHOLE, Part, check_ranks, head_span, mlp_span, part_of
from model.tensor_names import num_parameters, parameter_shapes
from tests.checkpoints import tiny_config

V1_5 = ViTConfig(3200, 1, 25, 12800, 448, 14, "rms_norm", True, False)
V2_5_300M = ViTConfig(1024, 1, 16, 4096, 448, 14, "layer_norm", False, True)
ON_RANK_0 = ("attn.proj.bias", "mlp.fc2.bias")
SPLIT = (
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.q_norm.weight",
    "attn.k_norm.weight",
    "attn.proj.weight",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
)


@pytest.mark.parametrize("config", [V1_5, V2_5_300M], ids=["6B", "300M"])
def test_parts_are_the_whole_and_nothing_twice(config: ViTConfig) -> None:
    for size in range(1, config.num_heads + 1):
        for name, shape in parameter_shapes(config).items():
            parts = [part_of(name, config, rank, size) for rank in range(size)]
            if size == 1 or not name.endswith((*SPLIT, *ON_RANK_0)):
                assert parts == [WHOLE] * size, name
            elif name.endswith(ON_RANK_0):
                assert parts == [WHOLE] + [None] * (size - 1), name
            else:
                covered = []
                for part in parts:
                    assert part is not None
                    assert part.dim == (1 if name.endswith(("proj.weight", "fc2.weight")) else 0)
                    assert all(start < stop for start, stop in part.spans), name
                    covered += part.spans
                length = shape[parts[0].dim]  # type: ignore[union-attr, index]
                edges = sorted(covered)
                assert edges[0][0] == 0
                assert edges[-1][1] == length
                assert all(a[1] == b[0] for a, b in pairwise(edges)), name


def test_q_k_and_v_of_a_rank_are_of_the_same_heads() -> None:
    """Rank 1 of 2 has heads 13 to 24 of 25, 128 wide."""
    qkv = part_of("encoder.layers.7.attn.qkv.weight", V1_5, 1, 2)
    assert qkv == Part(0, ((1664, 3200), (4864, 6400), (8064, 9600)))
    assert part_of("encoder.layers.7.attn.proj.weight", V1_5, 1, 2) == Part(1, ((1664, 3200),))
    assert part_of("encoder.layers.7.attn.q_norm.weight", V1_5, 1, 2) == Part(0, ((1664, 3200),))


@pytest.mark.parametrize(
    ("size", "heads"),
    [(2, [13, 12]), (4, [7, 6, 6, 6]), (8, [4, 3, 3, 3, 3, 3, 3, 3]), (25, [1] * 25)],
)
def test_heads_are_shared_unevenly(size: int, heads: list[int]) -> None:
    spans = [head_span(V1_5, rank, size) for rank in range(size)]
    assert [stop - start for start, stop in spans] == heads


def test_mlp_columns_stay_together_in_sixteens_where_they_can() -> None:
    widths = [stop - start for start, stop in (mlp_span(V1_5, rank, 3) for rank in range(3))]
    assert widths == [4272, 4272, 4256]
    odd = ViTConfig(80, 1, 5, 30, 56, 14, "rms_norm", True, False)
    assert [mlp_span(odd, rank, 4) for rank in range(4)] == [(0, 8), (8, 16), (16, 23), (23, 30)]


@pytest.mark.parametrize("size", [0, 26])
def test_more_ranks_than_heads_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"tensor_parallel: {size}; the checkpoint has 25 heads"):
        check_ranks(V1_5, size)


@pytest.mark.parametrize("layout", ["remote-code", "internvl", "transformers"])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_ranks_read_their_slices_from_every_layout(
    layout: Layout, kind: str, tmp_path: Path
) -> None:
    """Concatenated they are the whole tensors; no rank reads more than its share."""
    config = tiny_config(kind, 56)
    write_random_checkpoint(tmp_path, config, seed=3, layout=layout, num_files=2)
    checkpoint = open_checkpoint(str(tmp_path))
    names = parameter_shapes(config)
    cpu = torch.device("cpu")
    whole = read_weights(checkpoint, dict.fromkeys(names, WHOLE), torch.float32, cpu)
    for size in range(2, config.num_heads + 1):
        parts = [
            {n: part for n in names if (part := part_of(n, config, rank, size)) is not None}
            for rank in range(size)
        ]
        ranks = [read_weights(checkpoint, part, torch.float32, cpu) for part in parts]
        for name, value in whole.items():
            held = [rank[name] for rank in ranks if name in rank]
            dim = parts[0][name].dim
            if dim is None:
                assert all(torch.equal(piece, value) for piece in held)
            elif "qkv" in name:
                thirds = [torch.cat(t) for t in zip(*(h.chunk(3) for h in held), strict=True)]
                assert torch.equal(torch.cat(thirds), value)
            else:
                assert torch.equal(torch.cat(held, dim), value), name


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_of_the_6b_holds_its_share(size: int) -> None:
    """Within 3 % of what is replicated and 1/N of what is split, but for the uneven heads."""
    whole, split, replicated = num_parameters(V1_5), 0, 0
    held = [0] * size
    for name, shape in parameter_shapes(V1_5).items():
        count = torch.Size(shape).numel()
        is_split = name.endswith(SPLIT)
        split, replicated = split + is_split * count, replicated + (not is_split) * count
        for rank in range(size):
            part = part_of(name, V1_5, rank, size)
            if part is not None and part.dim is None:
                held[rank] += count
            elif part is not None:
                along = sum(stop - start for start, stop in part.spans)
                held[rank] += count // shape[part.dim] * along  # type: ignore[index]
    assert split + replicated == whole
    assert sum(held) - (size - 1) * replicated == pytest.approx(whole, rel=1e-3)
    attention = split / 3  # 4 D² of 12 D²
    largest_share, even_share = -(-25 // size) / 25, 1 / size  # of the heads
    allowed = 1.03 * (replicated + split / size) + (largest_share - even_share) * attention
    assert max(held) <= allowed
