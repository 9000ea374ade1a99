"""Unit vectors, and exact search over what comes bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.unit_vectors import Nearest, normalized


def test_vectors_get_length_one() -> None:
    given = np.array([[3, 4], [0, 0], [1e-3, 0]], np.float16)
    np.testing.assert_allclose(normalized(given), [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-6)
    assert given[0, 0] == 3


@pytest.mark.parametrize("step", [1, 7, 100])
def test_the_nearest_are_those_of_a_full_sort(step: int) -> None:
    rng = np.random.default_rng(5)
    vectors = normalized(rng.standard_normal((100, 8)))
    queries = normalized(rng.standard_normal((6, 8)))
    nearest = Nearest(queries, 9)
    for start in range(0, 100, step):
        nearest.add(vectors[start : start + step], np.arange(start, min(start + step, 100)))
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :9]
    assert [set(row) for row in nearest.label.tolist()] == [set(row) for row in expected.tolist()]
    found = np.take_along_axis(queries @ vectors.T, nearest.label, axis=1)
    np.testing.assert_allclose(nearest.similarity, found, atol=1e-6)


def test_fewer_than_asked_are_all_given() -> None:
    nearest = Nearest(normalized(np.eye(2)), 5)
    nearest.add(normalized(np.eye(2)), np.array([7, 8]))
    assert np.sort(nearest.label).tolist() == [[7, 8], [7, 8]]
