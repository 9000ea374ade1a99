"""Loading holds one copy of the weights in host memory, not two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model.checkpoint import open_checkpoint, write_random_checkpoint
from model.config import Layout, ViTConfig

ROOT = Path(__file__).parents[3]

LOAD = """
import sys, threading
import psutil, torch
from model.checkpoint import open_checkpoint
from model.encoder import Encoder
torch.set_num_threads(1)
checkpoint = open_checkpoint(sys.argv[1])
process, done, peak = psutil.Process(), threading.Event(), 0
before = process.memory_info().rss
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, process.memory_info().rss)
thread = threading.Thread(target=watch)
thread.start()
encoder = Encoder.load(checkpoint, dtype="float32", device="cpu")
# Touches every page: what a mapped file holds counts once it is read.
total = sum(float(p.sum()) for p in encoder._network.parameters())
peak = max(peak, process.memory_info().rss)
done.set()
thread.join()
assert total == total
print(peak - before)
"""


@pytest.mark.parametrize("layout", ["remote-code", "internvl"])
def test_the_peak_is_one_copy(layout: Layout, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=640, num_layers=10, num_heads=5, intermediate_size=2560, image_size=56,
        patch_size=14, norm="rms_norm", qk_norm=True, qkv_bias=False,
    )  # fmt: skip
    write_random_checkpoint(tmp_path, config, seed=0, layout=layout, num_files=2)
    size = sum(file.stat().st_size for file in open_checkpoint(str(tmp_path)).files)
    assert size > 190e6
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    grown = int(done.stdout)
    assert 0.9 * size < grown < 1.3 * size
