"""Builds one segment of an index: reads its shards, one after the other, and publishes it.

A plain function, which a Ray task calls: everything it takes is small, and so is what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.index_files import publish_faiss, publish_table, read_faiss
from pipeline.index_kinds import empty_index, reserve
from pipeline.index_models import Queries, read_queries
from pipeline.index_recall import (
    NEAREST_SCHEMA,
    NEIGHBORS,
    found_path,
    publish_found,
    search_queries,
)
from pipeline.index_record import (
    PICTURE_SCHEMA,
    Hnsw,
    IndexedShard,
    Model,
    Parameters,
    Segment,
    digest,
    read_whole,
    segment_path,
)
from pipeline.index_sample import (
    OutputChangedError,
    PlannedShard,
    VectorSource,
    planned_vectors,
)
from pipeline.open_shards import OpenShard
from pipeline.read import Vectors
from pipeline.storage import Storage, join
from pipeline.unit_vectors import Nearest, normalized_slices
from pipeline.vector_index import OpenSegment

CAPTION_CHARACTERS = 500


@dataclass(frozen=True)
class SegmentRequest:
    """What decides a segment, and where it goes."""

    index: str
    source: VectorSource
    caption: str | None
    parameters: Parameters
    model: Model
    shards: tuple[PlannedShard, ...]

    @property
    def name(self) -> str:
        commits = (shard.commit for shard in self.shards)
        return digest(self.model.name, str(self.caption), *commits)

    @property
    def vectors(self) -> int:
        return sum(shard.pictures for shard in self.shards)


def build_segment(request: SegmentRequest, storage: Storage) -> Segment | None:
    """Builds and publishes a segment, or finds it published; None where OUTPUT has changed.

    Memory: `index_kinds.task_bytes`.

    Raises:
        UserError, OSError: a storage failed, or a part of OUTPUT is damaged.
    """
    found = read_whole(Segment, request.index, segment_path(request.name), storage)
    if found is not None:
        return found
    threads = faiss.omp_get_max_threads()
    if isinstance(request.parameters, Hnsw):
        faiss.omp_set_num_threads(1)  # a graph that is built by several is another one each time
    try:
        return _build(request, storage)
    except OutputChangedError:
        return None
    finally:
        faiss.omp_set_num_threads(threads)


def _build(request: SegmentRequest, storage: Storage) -> Segment:
    index, model, source = request.index, request.model, request.source
    queries = read_queries(index, model, storage)
    vectors = (
        empty_index(request.parameters, source.width)
        if model.trained is None
        else read_faiss(index, model.trained, storage, mapped=False)
    )
    reserve(vectors, request.vectors)
    pictures, nearest = [PICTURE_SCHEMA.empty_table()], [NEAREST_SCHEMA.empty_table()]
    shards = []
    for planned in request.shards:
        with source.output.open(planned.name) as opened:
            start = vectors.ntotal
            tables, near = _add(planned, opened, request, vectors, queries)
        pictures += tables
        nearest.append(near)
        shards.append(
            IndexedShard(
                shard=planned.name, commit=planned.commit, start=start, count=planned.pictures
            )
        )
    path, of_pictures, of_nearest = segment_path(request.name), _one(pictures), _one(nearest)
    opened_segment = OpenSegment(shards, request.parameters, vectors, of_pictures)
    found = search_queries(opened_segment, of_nearest, queries)
    segment = Segment(
        name=request.name,
        index=publish_faiss(index, f"{path}.faiss", vectors, storage),
        pictures=publish_table(index, f"{path}.parquet", of_pictures, storage),
        nearest=publish_table(index, f"{path}.nearest.parquet", of_nearest, storage),
        found=publish_found(index, found_path(request.name, shards), found, storage),
        shards=tuple(shards),
    )
    storage.publish_bytes(join(index, segment.json_path), segment.dump())
    return segment


def _add(
    shard: PlannedShard,
    opened: OpenShard | None,
    request: SegmentRequest,
    vectors: faiss.Index,
    queries: Queries,
) -> tuple[list[pa.Table], pa.Table]:
    """Adds a shard's vectors; gives whose they are, and which are nearest to the queries."""
    carried = [] if request.caption is None else [request.caption]
    nearest = Nearest(queries.vectors, NEIGHBORS + 1)
    tables = []
    for run in _ahead(planned_vectors(shard, opened, request.source, carried)):
        for values in normalized_slices(run.values):
            nearest.add(values, np.arange(vectors.ntotal, vectors.ntotal + len(values)))
            vectors.add(values)
        tables.append(_pictures(run, shard.name, request.caption))
    return tables, _nearest(nearest)


def _ahead(runs: Iterator[Vectors]) -> Iterator[Vectors]:
    """The same, each read while the one before is added."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, runs, None)
        while (run := coming.result()) is not None:
            coming = reader.submit(next, runs, None)
            yield run


def _pictures(run: Vectors, name: str, caption: str | None) -> pa.Table:
    rows = len(run.values)
    columns = [
        run.pictures["key"],
        pa.array([name] * rows).dictionary_encode(),
        run.pictures["sample_index"],
        pa.nulls(rows, pa.string()) if caption is None else _shortened(run.pictures[caption]),
    ]
    return pa.table(columns, schema=PICTURE_SCHEMA)


def _shortened(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """A caption may have megabytes; a search holds them all in memory."""
    return pc.utf8_slice_codeunits(captions, 0, CAPTION_CHARACTERS)


def _nearest(nearest: Nearest) -> pa.Table:
    queries, found = nearest.label.shape
    return pa.table(
        [
            np.repeat(np.arange(queries, dtype=np.int32), found),
            nearest.label.ravel(),
            nearest.similarity.ravel(),
        ],
        schema=NEAREST_SCHEMA,
    )


def _one(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()
