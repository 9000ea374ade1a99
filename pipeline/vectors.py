"""Features as Arrow columns and as arrays, without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def feature_values(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.floating]:
    """A feature's column as an array [n, D], without a copy where it is one piece."""
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values = whole.flatten().to_numpy(zero_copy_only=False)
    shaped: npt.NDArray[np.floating] = values.reshape(-1, width)
    return shaped


def vectors(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """[n, ...] as a column of n lists."""
    width = int(np.prod(values.shape[1:]))
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, width)
