"""One vector of a picture's tiles, by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

VectorChoice = Literal["thumbnail", "mean", "first"]
VECTOR_CHOICES: tuple[VectorChoice, ...] = get_args(VectorChoice)

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Booleans = npt.NDArray[np.bool_]

# Each takes the rows' values [n, D] and is_thumbnail [n], and where pictures begin among them; it
# gives a vector of each picture in the values' own type, means in float32.
OneOfTiles = Callable[[Floats, Integers, Booleans], Floats]


def _last_tiles(values: Floats, starts: Integers, thumbnails: Booleans) -> Floats:
    """The thumbnail comes last; a picture of one tile has no other."""
    last = np.append(starts[1:], len(values)) - 1
    assert (thumbnails[last] | (last == starts)).all(), "the settings say that there are thumbnails"
    return _rows(values, last)


def _means(values: Floats, starts: Integers, thumbnails: Booleans) -> Floats:
    sums = np.add.reduceat(values, starts, axis=0, dtype=np.float32)
    counts = np.diff(np.append(starts, len(values))).astype(np.float32)
    return sums / counts[:, np.newaxis]


def _first_tiles(values: Floats, starts: Integers, thumbnails: Booleans) -> Floats:
    return _rows(values, starts)


def _rows(values: Floats, rows: Integers) -> Floats:
    """Rising rows; all of them are not copied."""
    return values if len(rows) == len(values) else values[rows]


ONE_OF_TILES: Mapping[VectorChoice, OneOfTiles] = {
    "thumbnail": _last_tiles,
    "mean": _means,
    "first": _first_tiles,
}
