"""How large pictures are, from a sample of the output's parts: commits do not tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from jobs.range_file import RangeFile
from pipeline.commits import PartFile
from pipeline.storage import Storage, join
from pipeline.webdataset_format import UNREADABLE, documents_at_head

HEAD_BYTES = 8 << 20
# Edges of the histogram of longer sides, in pixels; each bin begins at one.
EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)


@dataclass(frozen=True)
class Sizes:
    """Pictures by longer side: `counts[i]` from `EDGES[i]` on. `parts` were looked into, the first
    rows of each. `problem` is why the last one that failed could not be."""

    counts: tuple[int, ...]
    parts: int
    failed: int
    problem: str | None

    @property
    def pictures(self) -> int:
        return sum(self.counts)


def sample_sizes(parts: Sequence[PartFile], output: str, storage: Storage) -> Sizes:
    """Reads a little of each part, by ranges."""
    counts = np.zeros(len(EDGES), np.int64)
    failed, problem = 0, None
    for part in parts:
        try:
            sides = _longer_sides(part, output, storage)
        except (OSError, *UNREADABLE) as error:
            failed, problem = failed + 1, f"{part.path}: {type(error).__name__}: {error}"
            continue
        places = np.searchsorted(EDGES, sides, side="right") - 1
        counts += np.bincount(places, minlength=len(EDGES))
    return Sizes(tuple(map(int, counts)), len(parts) - failed, failed, problem)


def _longer_sides(part: PartFile, output: str, storage: Storage) -> npt.NDArray[np.int64]:
    """Of the pictures in the first row group, or in the first megabytes of a tar."""
    if part.path.endswith(".tar"):
        head = storage.read_range(join(output, part.path), 0, min(part.bytes, HEAD_BYTES))
        sides = [max(doc["width"], doc["height"]) for doc in documents_at_head(head)]
        return np.array(sides, np.int64)
    table = part.beside[-1] if part.beside else part
    source = RangeFile(join(output, table.path), table.bytes, storage)
    with pq.ParquetFile(source) as file:
        rows = file.read_row_group(0, ["width", "height", "tile_index"], use_threads=False)
    first = rows["tile_index"].to_numpy() == 0
    longer = np.maximum(rows["width"].to_numpy(), rows["height"].to_numpy())
    chosen: npt.NDArray[np.int64] = longer[first].astype(np.int64)
    return chosen
