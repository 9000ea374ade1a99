"""What an index is trained on, and along which axes it keeps vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.index_models import principal_axes
from pipeline.index_sample import (
    OutputChangedError,
    PlannedShard,
    VectorSource,
    sample_places,
    take_sample,
)
from pipeline.read import open_output
from pipeline.unit_vectors import normalized
from tests.stages import STORAGE
from tests.vector_outputs import clustered, put_shard, vector_dataset

WIDTH = 40
DATASET = vector_dataset({"cls": WIDTH})


def test_the_axes_keep_what_the_best_ones_keep() -> None:
    vectors = normalized(clustered(500, WIDTH, 3)).astype(np.float16)
    axes = principal_axes(vectors, 8)
    np.testing.assert_allclose(axes @ axes.T, np.eye(8), atol=1e-6)
    moments = vectors.astype(np.float64).T @ vectors.astype(np.float64)
    best = np.linalg.eigvalsh(moments)[-8:].sum()
    kept = (vectors.astype(np.float64) @ axes.T.astype(np.float64)) ** 2
    assert kept.sum() == pytest.approx(best, rel=1e-4)
    # Each carries a fair share: untouched, the first axis alone would carry half of it.
    assert kept.sum(axis=0).max() < 0.4 * kept.sum()
    np.testing.assert_array_equal(axes, principal_axes(vectors, 8))


def test_all_axes_keep_everything() -> None:
    vectors = normalized(clustered(20, 6, 3)).astype(np.float16)
    axes = principal_axes(vectors, 6)
    reduced = vectors.astype(np.float32) @ axes.T
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=2e-3)


def test_a_sample_is_what_its_places_say(tmp_path: Path) -> None:
    output = str(tmp_path)
    commits = [
        put_shard(output, DATASET, name, {"cls": clustered(50, WIDTH, n)}, STORAGE, num_parts=2)
        for n, name in enumerate(["a", "b", "c"])
    ]
    shards = [PlannedShard.of(commit) for commit in commits]
    source = VectorSource(open_output(output), "cls", "first")
    sample = take_sample(source, shards, 60)
    places = {shard.name: rows.tolist() for shard, rows in sample_places(shards, 60).items()}
    expected = [(name, row) for name, rows in places.items() for row in rows]
    assert list(zip(sample.shards, sample.sample_indices.tolist(), strict=True)) == expected
    for vector, (name, row) in zip(sample.vectors, expected, strict=True):
        stored = clustered(50, WIDTH, "abc".index(name))[row].astype(np.float16)
        np.testing.assert_allclose(vector, normalized(stored[None])[0], atol=1e-3)
    put_shard(output, DATASET, "b", {"cls": clustered(50, WIDTH, 9)}, STORAGE, before=commits[1])
    with pytest.raises(OutputChangedError, match="b"):
        take_sample(source, shards, 60)
