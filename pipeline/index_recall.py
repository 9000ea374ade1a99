"""How much of what exact search finds the index finds: recall, over the model's queries.

A segment is searched with them when it is built, and again when shards of it have died; what was
found lies beside it. So a run merges small tables, and opens no other segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.index_files import publish_table, read_faiss, read_table
from pipeline.index_models import Queries
from pipeline.index_record import (
    IndexedShard,
    IndexFile,
    Parameters,
    Recall,
    Segment,
    digest,
    segment_path,
)
from pipeline.storage import Storage
from pipeline.vector_index import OpenSegment

NEIGHBORS = 10  # recall@10; a query is itself among the vectors, so one more is kept
TIE = 1e-5  # two pictures whose cosines differ by less are equally near
NUM_READS_AT_ONCE = 8

# A row is one of the nearest of its shard by exact search; `id` is that of its vector.
NEAREST_SCHEMA = pa.schema(
    [
        pa.field("query", pa.int32()),
        pa.field("id", pa.int64()),
        pa.field("cosine", pa.float32()),
    ]
)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """What exact search and a search of the index find for q queries, each left out of its own
    neighbours. All [q, NEIGHBORS], the nearest first, -inf where there are no more.

    `exact`: cosines of the nearest; `similarity`: as the index tells it, of those that it finds;
    `cosine`: of the same, exact.
    """

    exact: Floats
    similarity: Floats
    cosine: Floats

    def merged(self, other: Found) -> Found:
        """The same of both: `other` is of later segments."""
        exact = -np.sort(-np.concatenate([self.exact, other.exact], axis=1), axis=1)
        similarity = np.concatenate([self.similarity, other.similarity], axis=1)
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBORS]
        cosine = np.concatenate([self.cosine, other.cosine], axis=1)
        return Found(
            exact[:, :NEIGHBORS],
            np.take_along_axis(similarity, best, axis=1),
            np.take_along_axis(cosine, best, axis=1),
        )

    def recall(self) -> Recall | None:
        """None where there are no neighbours to find.

        Pictures that are as near as the last of the nearest count as it does: of equal ones (the
        same picture in many shards) any will do.
        """
        wanted = np.isfinite(self.exact).sum(axis=1)  # [q]
        asked = np.flatnonzero(wanted)
        if not len(asked):
            return None
        least = self.exact[asked, wanted[asked] - 1] - np.float32(TIE)
        shares = (self.cosine[asked] >= least[:, np.newaxis]).sum(axis=1) / wanted[asked]
        value = round(float(shares.mean()), 4)
        return Recall(value=value, neighbors=NEIGHBORS, queries=len(asked))


def measure_recall(index: str, segments: Sequence[Segment], storage: Storage) -> Recall | None:
    """Recall@10 of an index of these segments, by what lies beside them."""
    with ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
        found = pool.map(lambda segment: read_found(index, segment.found, storage), segments)
        if (best := next(found, None)) is None:
            return None
        for later in found:
            best = best.merged(later)
    return best.recall()


def search_again(
    index: str, segment: Segment, parameters: Parameters, queries: Queries, storage: Storage
) -> Segment:
    """The segment, searched among what is live of it now; it is opened only where that is another
    part of it than before."""
    path = found_path(segment.name, segment.shards)
    if segment.found.path == path:
        return segment
    opened = OpenSegment(
        segment.shards,
        parameters,
        read_faiss(index, segment.index, storage),
        read_table(index, segment.pictures, storage),
    )
    found = search_queries(opened, read_table(index, segment.nearest, storage), queries)
    return segment.model_copy(update={"found": publish_found(index, path, found, storage)})


def search_queries(segment: OpenSegment, nearest: pa.Table, queries: Queries) -> Found:
    """Searches a segment among what is live of it.

    Args:
        nearest: of NEAREST_SCHEMA, for each shard its `NEIGHBORS` + 1 nearest, or all.
    """
    own = _own_ids(segment, queries)
    kept = _Kept(nearest, segment)
    exact = kept.best(own)
    similarity, ids = _found(segment, queries, own)
    cosine = kept.cosines(ids)
    return Found(exact, similarity, cosine)


def _own_ids(segment: OpenSegment, queries: Queries) -> Ids:
    """The id of each query's own picture; -1 where it is elsewhere."""
    shards = {shard.shard: shard for shard in segment.shards}
    samples = segment.pictures["sample_index"].to_numpy()
    own = np.full(len(queries.pictures), -1, np.int64)
    for query, (name, sample) in enumerate(queries.pictures):
        if (shard := shards.get(name)) is not None:
            of_shard = samples[shard.start : shard.start + shard.count]
            at = int(np.searchsorted(of_shard, sample))
            if at < len(of_shard) and of_shard[at] == sample:
                own[query] = shard.start + at
    return own


def _found(segment: OpenSegment, queries: Queries, own: Ids) -> tuple[Floats, Ids]:
    """Similarities and ids of what a search finds, both [q, NEIGHBORS]; -inf and -1 for none."""
    found, found_ids = segment.search(queries.vectors, NEIGHBORS + 1)
    is_none = (found_ids < 0) | (found_ids == own[:, np.newaxis])
    found = np.where(is_none, -np.inf, found)
    # As `VectorIndex` orders them.
    order = np.lexsort((found_ids, -found))[:, :NEIGHBORS]
    similarity = np.full((len(own), NEIGHBORS), -np.inf, np.float32)
    ids = np.full((len(own), NEIGHBORS), -1, np.int64)
    similarity[:, : order.shape[1]] = np.take_along_axis(found, order, axis=1)
    ids[:, : order.shape[1]] = np.take_along_axis(np.where(is_none, -1, found_ids), order, axis=1)
    return similarity, ids


class _Kept:
    """The nearest of each shard, by query and id."""

    def __init__(self, nearest: pa.Table, segment: OpenSegment) -> None:
        self._segment = segment
        query, ids = nearest["query"].to_numpy().astype(np.int64), nearest["id"].to_numpy()
        self._rows = max(1, segment.pictures.num_rows)
        places = query * self._rows + ids
        order = np.argsort(places)
        self._places, self._query, self._ids = places[order], query[order], ids[order]
        self._cosine: Floats = nearest["cosine"].to_numpy()[order]
        self._starts = [shard.start for shard in segment.shards]

    def best(self, own: Ids) -> Floats:
        """[q, NEIGHBORS]: cosines of the nearest live ones but for the own; -inf for none."""
        counts = self._segment.live[self._ids] & (self._ids != own[self._query])
        query, cosine = self._query[counts], self._cosine[counts]
        order = np.lexsort((-cosine, query))
        query, cosine = query[order], cosine[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        near = rank < NEIGHBORS
        best = np.full((len(own), NEIGHBORS), -np.inf, np.float32)
        best[query[near], rank[near]] = cosine[near]
        return best

    def cosines(self, ids: Ids) -> Floats:
        """Exact cosines [q, n] of ids [q, n]; -inf of -1, and of what is too far to be kept."""
        cosine = np.full(ids.shape, -np.inf, np.float32)
        if not len(self._places):
            return cosine
        places = np.arange(len(ids))[:, np.newaxis] * self._rows + ids
        at = np.searchsorted(self._places, places).clip(max=len(self._places) - 1)
        is_kept = (ids >= 0) & (self._places[at] == places)
        cosine[is_kept] = self._cosine[at[is_kept]]
        for query, place in zip(*np.nonzero((ids >= 0) & ~is_kept), strict=True):
            cosine[query, place] = self._as_the_last(int(query), int(ids[query, place]))
        return cosine

    def _as_the_last(self, query: int, found: int) -> float:
        """The cosine of a picture that is not kept: that of the last one kept of its shard where
        the index holds the same of both, as it does of equal pictures; else it is farther."""
        shard = self._segment.shards[int(np.searchsorted(self._starts, found, side="right")) - 1]
        first = query * self._rows + shard.start
        start, end = np.searchsorted(self._places, [first, first + shard.count])
        last = start + int(np.argmin(self._cosine[start:end]))
        of_last = self._segment.reconstruct(int(self._ids[last]))
        is_equal = np.array_equal(self._segment.reconstruct(found), of_last)
        return float(self._cosine[last]) if is_equal else -np.inf


def found_path(name: str, shards: Sequence[IndexedShard]) -> str:
    """Where that lies which a search among the live shards of a segment finds."""
    dead = [shard.shard for shard in shards if not shard.live]
    of_live = f".{digest(*dead)[:12]}" if dead else ""
    return f"{segment_path(name)}{of_live}.found.parquet"


def publish_found(index: str, path: str, found: Found, storage: Storage) -> IndexFile:
    columns = {field.name: getattr(found, field.name).ravel() for field in fields(Found)}
    return publish_table(index, path, pa.table(columns), storage)


def read_found(index: str, file: IndexFile, storage: Storage) -> Found:
    table = read_table(index, file, storage)
    return Found(*(table[field.name].to_numpy().reshape(-1, NEIGHBORS) for field in fields(Found)))
