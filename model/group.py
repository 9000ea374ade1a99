"""The ranks of one model, as the network sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _own(x: Tensor) -> Tensor:
    return x


def _own_number(number: int) -> int:
    return number


@dataclass(frozen=True)
class Group:
    """`all_reduce` adds a tensor up over the ranks, in place, and gives it back.

    `from_first` gives every rank the number that rank 0 called it with.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _own
    from_first: Callable[[int], int] = _own_number


ALONE = Group()


def distributed_group(
    rank: int, size: int, device: torch.device, beat: Callable[[], None]
) -> Group:
    """The group of torch.distributed's process group, which must be there already.

    `beat` is called at each collective: a sign of life of this rank.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def all_reduce(x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        beat()
        return x

    def from_first(number: int) -> int:
        told = torch.tensor(number, device=device)
        torch.distributed.broadcast(told, src=0)
        return int(told)

    return Group(rank, size, all_reduce, from_first)
