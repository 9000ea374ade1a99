"""Attention kernels by name: softmax(q kᵀ / √d) v over all tokens, no mask, no dropout.

Shapes: q, k, v and the result are [B, N, H, d]: tiles, tokens, heads, head size. That is the
order a fused qkv projection gives and flash-attn takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own: picks its flash, memory-efficient or plain kernel by device and dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


KERNELS: dict[str, Attention] = {"sdpa": sdpa}


def resolve(name: str) -> str:
    """The kernel that `name` stands for on this machine; `auto` is the fastest installed one.

    Raises UserError for a name that is not known or not installed.
    """
    if name == "auto":
        return "sdpa"
    if name not in KERNELS:
        raise UserError(
            f"attention: {name!r} is not available here; choose auto or one of {sorted(KERNELS)}"
        )
    return name
