"""The committed rows that came with a group: which of its pictures need not be cut or computed."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from pipeline.tiling import TilePlan

# What a committed row must agree in with the picture and its plan, beside its features.
IDENTITY = ("image_sha256", "tile_count", "width", "height")


class KnownPictures:
    """Rows of whole pictures, found by the sha256 of the encoded bytes.

    Args:
        table: columns of `IDENTITY` and of each feature; None where nothing is known.
    """

    def __init__(self, table: pa.Table | None) -> None:
        self._table = table
        self._starts: dict[bytes, int] = {}
        if table is not None:
            digests, *plans = (table[name].to_pylist() for name in IDENTITY)
            for row, digest in enumerate(digests):
                self._starts.setdefault(digest, row)
            self._plans = list(zip(*plans, strict=True))

    def rows_of(self, data: bytes, plan: TilePlan) -> range | None:
        """Where the picture's rows are, if it was cut then as it would be now."""
        if not self._starts:
            return None
        start = self._starts.get(hashlib.sha256(data).digest())
        if start is None or self._plans[start] != (plan.tile_count, plan.width, plan.height):
            return None
        return range(start, start + plan.tile_count)

    def features(self, rows: list[int], known_rows: list[int]) -> pa.Table | None:
        """`Chunk.known` for these rows of a chunk, which are `known_rows` here."""
        if self._table is None:
            return None
        features = self._table.drop_columns(list(IDENTITY))
        taken = features.take(pa.array(known_rows, pa.int64())).combine_chunks()
        return taken.add_column(0, "row", pa.array(rows, pa.int32()))
