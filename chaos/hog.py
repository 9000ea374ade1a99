"""Another job on the cluster, which fills the object store of every worker and keeps it full.

python -m chaos.hog BYTES_PER_NODE: prints a line when it has done so, and ends with its stdin.
"""

from __future__ import annotations

import sys

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OBJECT_BYTES = 10 << 20
FILL_SECONDS = 20.0  # where the disk it spills to fills up, not all objects find a place


def fill() -> np.ndarray:
    return np.ones(OBJECT_BYTES, dtype=np.uint8)


def main() -> None:
    bytes_per_node = int(sys.argv[1])
    ray.init(address="auto", log_to_driver=False)
    objects = [
        ray.remote(fill)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in ray.nodes()
        if node["Alive"] and "CPU" in node["Resources"]
        for _ in range(bytes_per_node // OBJECT_BYTES)
    ]
    ray.wait(objects, num_returns=len(objects), timeout=FILL_SECONDS, fetch_local=False)
    print("full", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
