"""A process that is rank 0, for tests that stop or kill ranks.

    python -m … CHECKPOINT SIZE HANG on|once|loading

Prints the process ids of the other ranks, then embeds without end, or once and waits; a line after
the first time. `loading`: kills another rank while both load, and then waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import psutil
import torch

from model import ranks
from model.checkpoint import open_checkpoint
from model.ranks import ParallelEncoder, RankSettings


def kill_and_wait(self: RankSettings, rank: int, beat: Callable[[], None], store: int) -> NoReturn:
    """Ends as a collective does whose other side is gone."""
    ranks._join(rank, self.size, self.device, beat, store)
    for child in psutil.Process().children():
        os.kill(child.pid, signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
    raise AssertionError("the other rank is dead")


if __name__ == "__main__":
    if sys.argv[4] == "loading":
        RankSettings.load = kill_and_wait  # type: ignore[method-assign]
    checkpoint = open_checkpoint(sys.argv[1])
    encoder = ParallelEncoder(
        checkpoint,
        int(sys.argv[2]),
        dtype="float32",
        device="cpu",
        hang_seconds=float(sys.argv[3]),
    )
    print(*encoder.pids, flush=True)
    side = checkpoint.config.image_size
    tiles = np.zeros((8, side, side, 3), np.uint8)
    encoder.encode(tiles)
    print("embedded", flush=True)
    while sys.argv[4] == "once":
        signal.pause()
    while True:
        encoder.encode(tiles)
