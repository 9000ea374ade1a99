"""Vectors of length 1, and which of them are nearest by exact search."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
SLICE = 1024  # vectors in a place that is used again


def normalized(vectors: npt.NDArray[np.floating]) -> Floats:
    """[n, D] as float32 of length 1; zeros stay zeros."""
    return _normalize(np.array(vectors, np.float32, order="C"))


def normalized_slices(vectors: npt.NDArray[np.floating]) -> Iterator[Floats]:
    """The same, `SLICE` at a time, each in the place of the one before: memory that is new to the
    process costs more than what is done with it."""
    place = np.empty((min(SLICE, len(vectors)), vectors.shape[1]), np.float32)
    for start in range(0, len(vectors), SLICE):
        run = vectors[start : start + SLICE]
        values = place[: len(run)]
        values[...] = run
        yield _normalize(values)


def _normalize(values: Floats) -> Floats:
    norms = np.sqrt(np.einsum("nd,nd->n", values, values))
    norms[norms == 0] = 1
    values /= norms[:, np.newaxis]
    return values


class Nearest:
    """The `count` nearest to each of q queries among all vectors that were added.

    `similarity` and `label` are [q, at most count], in no order.
    """

    def __init__(self, queries: Floats, count: int) -> None:
        self._queries = queries
        self._count = count
        self.similarity = np.empty((len(queries), 0), np.float32)
        self.label = np.empty((len(queries), 0), np.int64)

    def add(self, vectors: Floats, labels: npt.NDArray[np.integer]) -> None:
        """vectors: [n, D] of length 1; labels: [n]."""
        # Not numpy's product: its threads wait in loops for the next one.
        count = min(self._count, len(vectors))
        found, places = faiss.knn(self._queries, vectors, count, faiss.METRIC_INNER_PRODUCT)
        similarity = np.concatenate([self.similarity, found], axis=1)
        label = np.concatenate([self.label, labels.astype(np.int64)[places]], axis=1)
        if similarity.shape[1] > self._count:
            best = np.argpartition(-similarity, self._count - 1, axis=1)[:, : self._count]
            similarity = np.take_along_axis(similarity, best, axis=1)
            label = np.take_along_axis(label, best, axis=1)
        self.similarity, self.label = similarity, label
