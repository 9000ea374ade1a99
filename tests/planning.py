"""Cases that the tests of `plan` share."""

from __future__ import annotations

from pathlib import Path

from jobs.capacity import Costs, Work
from jobs.cpu_rate import CpuRates
from jobs.device_tables import load_devices, load_prices
from jobs.outcome import CpuRun, Setting
from model.work import V1_5
from tests.builders import samples, write_tar

# 400 tiles/s a core with reading and writing, 6 500 bytes a row
COSTS = Costs(
    read_cpu_per_byte=1e-9,
    tile_cpu_per_tile=0.00238,
    write_cpu_per_tile=0.0001,
    stream_bytes_per_second=100e6,
    output_bytes_per_tile=6500,
    commit_bytes=700,
)
# 100 shards of 10 000 pictures at 8 tiles and 100 kB
WORK = Work(shards=100, read_bytes=100e9, pictures=1e6, tiles=8e6, rejects=1000, chunks=70_000)
RATES = CpuRates(
    encode_alone=80.0,
    encode_beside=60.0,
    tile_alone=600.0,
    tile_beside=150.0,
    load_seconds=4.0,
    detail="",
)


def setting(**changes: object) -> Setting:
    """The 6B on the devices that ship, and a CPU that does 80 tiles/s."""
    usual: dict[str, object] = {
        "config": V1_5,
        "blocks": 45,
        "tile_size": 448,
        "dtype": "bfloat16",
        "devices": load_devices(None),
        "prices": load_prices(None),
        "costs": COSTS,
        "target_part_bytes": 512 << 20,
        "cpu": CpuRun(RATES, 2, 1, "measured", "here"),
    }
    return Setting(**{**usual, **changes})  # type: ignore[arg-type]


def write_input(folder: Path, num_shards: int = 12, num_samples: int = 10) -> Path:
    """Shards of small pictures of different shapes, the same for the same numbers."""
    for number in range(num_shards):
        members = samples(num_samples, seed=number, prefix=f"{number}-")
        write_tar(folder / f"{number:05d}.tar", members)
    return folder
