"""An OUTPUT of random clustered vectors, in its real layout, as large as asked.

Clusters have about a thousand vectors each. All lie in one subspace of 512 dimensions, turned at
random into the D of the vectors. Within a cluster the standard deviation along dimension i decays
as 1/sqrt(i), times a factor of the cluster's own (log-normal, sigma 0.5), so that no two clusters
are alike; centres are drawn likewise, 1.5 times as wide. Isotropic noise in all D dimensions adds
2 % of the variance. Seeded.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from pipeline.storage import Storage
from tests.vector_outputs import put_shard, vector_dataset

DIMENSIONS = 512
CLUSTER_VECTORS = 1000
CENTRE_SPREAD = 1.5
CLUSTER_SIGMA = 0.5
NOISE = 0.02
FEATURE = "cls"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clusters:
    """Of how many vectors of which width there are clusters."""

    vectors: int
    width: int

    def world(self) -> tuple[Floats, Floats, Floats, Floats]:
        """basis [r, D], spectrum [r], the clusters' factors [c, r] and centres [c, r]."""
        rng = np.random.default_rng(0)
        count = max(1, self.vectors // CLUSTER_VECTORS)
        rank = min(DIMENSIONS, self.width)
        basis = np.linalg.qr(rng.standard_normal((self.width, rank), np.float32))[0].T
        spectrum = (1 / np.sqrt(1 + np.arange(rank))).astype(np.float32)
        factors = np.exp(CLUSTER_SIGMA * rng.standard_normal((count, rank), np.float32))
        centres = CENTRE_SPREAD * spectrum * rng.standard_normal((count, rank), np.float32)
        return np.ascontiguousarray(basis), spectrum, factors, centres

    def draw(self, num: int, seed: int) -> Floats:
        """[num, D]"""
        basis, spectrum, factors, centres = self.world()
        rng = np.random.default_rng((1, seed))
        cluster = rng.integers(len(centres), size=num)
        inside = rng.standard_normal((num, len(spectrum)), np.float32)
        inside *= spectrum * factors[cluster]
        inside += centres[cluster]
        noise = np.float32(np.sqrt(NOISE * (spectrum**2).sum() / self.width))
        vectors = rng.standard_normal((num, self.width), np.float32)
        vectors *= noise
        vectors += inside @ basis
        return vectors


def put_one(output: str, clusters: Clusters, number: int, pictures: int) -> str:
    """Shard `number`; one tile a picture, float16, a row group a shard of ten thousand."""
    dataset = vector_dataset({FEATURE: clusters.width}, tiling="center-crop")
    values = {FEATURE: clusters.draw(pictures, number)}
    name = f"{number:05d}"
    put_shard(output, dataset, name, values, Storage(), group_rows=10_000)
    return name


def put_all(output: str, clusters: Clusters, shards: int, pictures: int) -> None:
    put_one(output, clusters, 0, pictures)  # alone: it writes dataset.json
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        done = [pool.submit(put_one, output, clusters, n, pictures) for n in range(1, shards)]
        for one in done:
            one.result()
