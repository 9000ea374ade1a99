"""What rows OUTPUT has and how they lie there: what all that reads or writes a part must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.commits import Dataset, Format
from pipeline.records import Shape, embedding_schema, num_values


@dataclass(frozen=True)
class Layout:
    """`features` gives what each one is of a tile: D values, or tokens x D."""

    format: Format
    features: Mapping[str, Shape]
    embedding_dtype: str
    carry: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        return embedding_schema(self.features, self.embedding_dtype, self.carry)

    @property
    def tile_bytes(self) -> int:
        """Of all features of one tile."""
        return tile_bytes(self.features, self.embedding_dtype)


def tile_bytes(features: Mapping[str, Shape], embedding_dtype: str) -> int:
    return sum(map(num_values, features.values())) * np.dtype(embedding_dtype).itemsize


def layout_of(dataset: Dataset) -> Layout:
    settings = dataset.settings
    return Layout(
        settings.get("format", "parquet"),
        dataset.features,
        settings["embedding_dtype"],
        tuple(settings["carry"]),
    )
