"""Searches an index: neighbours by cosine similarity, over all its segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from model.errors import UserError
from pipeline.index_files import read_faiss, read_table
from pipeline.index_kinds import search_parameters, similarities
from pipeline.index_record import (
    IndexedShard,
    IndexRecord,
    Parameters,
    read_record,
    record_url,
)
from pipeline.printable import printable
from pipeline.storage import Storage, redact
from pipeline.unit_vectors import normalized

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
SHOWN = 5  # of several shards or samples


@dataclass(frozen=True)
class Neighbor:
    """A picture that is near. `similarity` is the cosine of the angle between the two vectors."""

    key: str
    shard: str
    sample_index: int
    similarity: float
    caption: str | None = None


class OpenSegment:
    """A segment's vectors, mapped from a local file, and what they are vectors of."""

    def __init__(
        self,
        shards: Sequence[IndexedShard],
        parameters: Parameters,
        vectors: faiss.Index,
        pictures: pa.Table,
    ) -> None:
        self.shards = shards
        self._parameters = parameters
        self.pictures = pictures
        self._vectors = vectors
        self.live = np.ones(pictures.num_rows, bool)
        for shard in shards:
            self.live[shard.start : shard.start + shard.count] = shard.live
        self._live_vectors = int(self.live.sum())
        # One bit a vector; a selector costs time, so that there is none where all are live.
        self._live_bits = None if self.live.all() else np.packbits(self.live, bitorder="little")

    def search(self, vectors: Floats, count: int) -> tuple[Floats, Ids]:
        """Similarities and ids, both [q, count]; id -1 where there are no more."""
        count = min(count, self._live_vectors)
        if not count:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        live = self._live_bits
        selector = None if live is None else faiss.IDSelectorBitmap(live)
        parameters = search_parameters(self._parameters, count, selector)
        found, ids = self._vectors.search(vectors, count, params=parameters)
        return similarities(self._parameters, found), ids

    def reconstruct(self, at: int) -> Floats:
        vector: Floats = self._vectors.reconstruct(at)
        return vector

    def find(self, key: str, shard: str | None) -> list[int]:
        """The ids of the live vectors with this key."""
        found = np.flatnonzero(pc.equal(self.pictures["key"], key).to_numpy() & self.live)
        if shard is None:
            return [int(at) for at in found]
        return [int(at) for at in found if self.pictures["shard"][int(at)].as_py() == shard]

    def neighbor(self, at: int, similarity: float) -> Neighbor:
        fields = self.pictures.slice(at, 1).to_pylist()[0]
        return Neighbor(
            fields["key"], fields["shard"], fields["sample_index"], similarity, fields["caption"]
        )


class VectorIndex:
    """An index as its record was when it was opened: later changes of INDEX do not reach it."""

    def __init__(self, index: str, record: IndexRecord, segments: list[OpenSegment]) -> None:
        self.record = record
        self._index = index
        self._segments = segments

    @staticmethod
    def open(index: str, storage: Storage) -> VectorIndex:
        """Opens an index; files of another store than the local one are copied to nameless local
        ones, whose bytes are compared with the record.

        Raises:
            UserError: there is none, or a part of it is missing or damaged.
        """
        seen: IndexRecord | None = None
        while (record := read_record(index, storage)) is not None:
            try:
                return open_segments(index, record, storage)
            except FileNotFoundError as error:
                if record == seen:
                    raise UserError(
                        f"{redact(index)}: a part that its record names is not there ({error}); "
                        "run `tessera index` again"
                    ) from error
                seen = record  # replaced while it was opened
        raise UserError(
            f"{redact(record_url(index))}: not there; is {redact(index)} an INDEX of "
            "`tessera index`?"
        )

    def search(self, vectors: npt.NDArray[np.floating], count: int) -> list[list[Neighbor]]:
        """The nearest pictures of each vector, the nearest first.

        Args:
            vectors: [q, D] of any norm but 0.
            count: neighbours of each; fewer where the index holds fewer.

        Raises:
            UserError: the vectors are of another width than the index.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.record.width:
            raise UserError(
                f"{redact(self._index)}: holds vectors of {self.record.width} values, "
                f"not {list(vectors.shape)}"
            )
        queries = normalized(vectors)
        found = [segment.search(queries, count) for segment in self._segments]
        results = []
        for query in range(len(queries)):
            near = [
                (-float(similarities[query, place]), number, int(ids[query, place]))
                for number, (similarities, ids) in enumerate(found)
                for place in range(ids.shape[1])
                if ids[query, place] >= 0
            ]
            nearest = sorted(near)[:count]
            results.append([self._segments[n].neighbor(at, -minus) for minus, n, at in nearest])
        return results

    def vector_of(
        self, key: str, shard: str | None = None, sample_index: int | None = None
    ) -> Floats:
        """The vector [D] of a picture, of length 1. Raises UserError: see `picture`."""
        return self.picture(key, shard, sample_index)[1]

    def picture(
        self, key: str, shard: str | None = None, sample_index: int | None = None
    ) -> tuple[Neighbor, Floats]:
        """A picture of the index, and its vector [D], of length 1.

        Raises:
            UserError: no picture is that, or several are.
        """
        found = [
            (segment, at, segment.neighbor(at, 1.0))
            for segment in self._segments
            for at in segment.find(key, shard)
        ]
        if sample_index is not None:
            found = [each for each in found if each[2].sample_index == sample_index]
        if not found:
            where = "" if shard is None else f" in shard {shard}"
            raise UserError(printable(f"{redact(self._index)}: no picture with key {key}{where}"))
        if len(found) > 1:
            told = _told_apart([neighbor for _, _, neighbor in found])
            raise UserError(printable(f"{redact(self._index)}: key {key} {told}"))
        ((segment, at, neighbor),) = found
        vector: Floats = normalized(segment.reconstruct(at)[np.newaxis])[0]
        return neighbor, vector


def _told_apart(neighbors: Sequence[Neighbor]) -> str:
    """Where the pictures of one key are, and what to give for one of them."""
    shards = sorted({neighbor.shard for neighbor in neighbors})
    if len(shards) > 1:
        return f"is in shards {_some(shards)}; say in which"
    samples = sorted(neighbor.sample_index for neighbor in neighbors)
    return (
        f"is that of samples {_some(samples)} of shard {shards[0]}; "
        "give the picture itself, not its key"
    )


def _some(names: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def open_segments(index: str, record: IndexRecord, storage: Storage) -> VectorIndex:
    """What a record names, opened.

    Raises:
        FileNotFoundError: a file is not there.
        UserError: a file is not what the record says.
    """
    segments = [
        OpenSegment(
            segment.shards,
            record.parameters,
            read_faiss(index, segment.index, storage),
            read_table(index, segment.pictures, storage),
        )
        for segment in record.segments
    ]
    return VectorIndex(index, record, segments)
