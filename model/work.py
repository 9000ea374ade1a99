"""What one tile costs a network, and a rank's part of it: pure arithmetic, no torch.

Legend: N tokens of a tile, D hidden size, M MLP columns.
"""

from __future__ import annotations

from model.config import ViTConfig
from model.split import head_span, mlp_span
from model.tensor_names import num_parameters

# InternViT-6B-448px-V1-5's config.json
V1_5 = ViTConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    intermediate_size=12800,
    image_size=448,
    patch_size=14,
    norm="rms_norm",
    qk_norm=True,
    qkv_bias=False,
)
BFLOAT16_BYTES, FLOAT32_BYTES = 2, 4


def block_flop(config: ViTConfig, num_heads: int, num_columns: int) -> int:
    """Multiplications and additions of one block and tile, with some of its heads and MLP columns.

    Linear layers 2 N (4 D h + 2 D m) and attention's two products 4 N² h, for h = heads · head size
    and m columns. Norms, softmax and GELU are not counted.
    """
    N, D, h = config.num_tokens, config.hidden_size, num_heads * config.head_dim
    return 2 * N * (4 * D * h + 2 * D * num_columns) + 4 * N * N * h


def patch_flop(config: ViTConfig) -> int:
    """FLOP of a tile's patch embedding, which every rank computes."""
    return 2 * config.num_patches * 3 * config.patch_size**2 * config.hidden_size


def tile_flop(config: ViTConfig, num_blocks: int | None = None) -> int:
    """FLOP of one tile through the patch embedding and the blocks (None: all)."""
    blocks = config.num_layers if num_blocks is None else num_blocks
    block = block_flop(config, config.num_heads, config.intermediate_size)
    return patch_flop(config) + blocks * block


def rank_flop(config: ViTConfig, size: int, num_blocks: int | None = None) -> int:
    """FLOP of one tile on the rank with most to do, which is rank 0: the others wait for it."""
    blocks = config.num_layers if num_blocks is None else num_blocks
    (first, last), (left, right) = head_span(config, 0, size), mlp_span(config, 0, size)
    return patch_flop(config) + blocks * block_flop(config, last - first, right - left)


def attention_flop(config: ViTConfig, size: int, num_blocks: int) -> int:
    """The part of `rank_flop` that is attention's two products, which are never in float8."""
    first, last = head_span(config, 0, size)
    return num_blocks * 4 * config.num_tokens**2 * (last - first) * config.head_dim


def sum_bytes(config: ViTConfig) -> tuple[int, ...]:
    """Bytes of the sums over the ranks, of a block and tile, in the order of the forward pass.

    q's and k's sums of squares (N x 2 float32), then the outputs of `proj` and `fc2` (N x D).
    """
    squares = (config.num_tokens * 2 * FLOAT32_BYTES,) if config.qk_norm else ()
    return (*squares, *[config.num_tokens * config.hidden_size * BFLOAT16_BYTES] * 2)


def ring_seconds(num_bytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of one sum over the ranks as a ring: NCCL's own model (src/graph/tuning.cc).

    `bandwidth` in bytes a second each way, `latency` in seconds of a step.
    """
    return 2 * (ranks - 1) * (num_bytes / ranks / bandwidth + latency)


def sums_seconds(
    config: ViTConfig, ranks: int, num_blocks: int, bandwidth: float, latency: float, batch: int
) -> float:
    """Seconds a tile that the ranks spend on their sums, which nothing overlaps."""
    if ranks == 1:
        return 0.0
    sums = [ring_seconds(batch * n, ranks, bandwidth, latency) for n in sum_bytes(config)]
    return num_blocks * sum(sums) / batch


def weight_bytes(config: ViTConfig, size: int, item_bytes: float) -> float:
    """Bytes of a rank's weights, evenly split; embeddings, which all hold, are a few MB."""
    return num_parameters(config) * item_bytes / size


def activation_bytes(config: ViTConfig, size: int, batch: int) -> float:
    """Bytes of a pass over `batch` tiles, as `Encoder._largest_batch` reckons them.

    The MLP before and after GELU, qkv, three residual streams, and half as much again.
    """
    widest = 2 * config.intermediate_size / size + 6 * config.hidden_size
    return 1.5 * batch * config.num_tokens * widest * BFLOAT16_BYTES
