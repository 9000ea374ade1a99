"""A process that is rank 0, for tests that stop or kill ranks.

    python -m … CHECKPOINT SIZE HANG on|once

Prints the process ids of the other ranks, then embeds without end, or once and waits; a line after
the first time.
"""

from __future__ import annotations

import signal
import sys

import numpy as np

from model.checkpoint import open_checkpoint
from model.ranks import ParallelEncoder

if __name__ == "__main__":
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
