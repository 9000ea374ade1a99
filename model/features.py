"""What is kept of a tile: from the tokens of a block to a feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.feature_shapes import CLASS_TOKENS, SHUFFLED


def pixel_shuffle(patches: Tensor) -> Tensor:
    """Patch tokens [b, G², D], row by row → [b, G²/4, 4 D], row by row of 2×2 patches.

    InternVL's pixel_shuffle (modeling_internvl_chat.py, ps_version v2; transformers'
    InternVLModel.pixel_shuffle): a token is its patches from left to right, then top to bottom.
    """
    b, P, D = patches.shape
    side = round(P**0.5) // SHUFFLED
    blocks = patches.reshape(b, side, SHUFFLED, side, SHUFFLED, D)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(b, side * side, SHUFFLED**2 * D)


# Tokens [b, N, hidden] of a block → a feature. `cls` is a copy, not a view, so that it does not
# keep all tokens in memory. Vectors are summed up and handed on in float32.
FEATURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda tokens: tokens[:, 0].to(torch.float32, copy=True),
    "mean": lambda tokens: tokens[:, CLASS_TOKENS:].mean(1, dtype=torch.float32),
    "tokens": lambda tokens: tokens,
    "tokens-2x2": lambda tokens: pixel_shuffle(tokens[:, CLASS_TOKENS:]),
}
