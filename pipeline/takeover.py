"""Committed rows of pictures that are still in a shard that has changed.

The reading task of such a shard copies the parts of the commit before to a nameless file on its
node, checks every byte against the commit, and learns which picture (by the sha256 of its encoded
bytes) stands where. Each group then gets the rows of its pictures along. Chunk boundaries do not
depend on what is found, so a repetition that finds less loses nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from model.errors import UserError
from pipeline.embedding import PartSettings
from pipeline.formats import open_part
from pipeline.generations import objects_of
from pipeline.known import IDENTITY
from pipeline.part_copies import OpenPart, PartError
from pipeline.records import Shard
from pipeline.replaced import read_replaced
from pipeline.samples import GroupRow
from pipeline.tar_headers import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The rows [start, start + count) of a batch are those of one picture."""

    part: int
    batch: int
    start: int
    count: int


class CommittedRows:
    """Rows of verified parts, found by picture. Memory: a batch, and the places."""

    def __init__(self, features: Sequence[str]) -> None:
        self._columns = [*IDENTITY, *features]
        self._parts: list[OpenPart] = []
        self._places: dict[bytes, Place] = {}
        self._read: tuple[tuple[int, int], pa.Table] | None = None

    def add(self, opened: OpenPart) -> None:
        """Takes a part in.

        Raises:
            PartError: its rows are not in the order of pictures and tiles.
        """
        part = len(self._parts)
        self._parts.append(opened)
        for batch in range(opened.num_batches):
            rows = opened.batch(batch, ["image_sha256", "tile_index", "tile_count"])
            starts = np.flatnonzero(rows["tile_index"].to_numpy() == 0)
            counts = rows["tile_count"].to_numpy()[starts]
            bounds = np.append(starts, rows.num_rows)
            if bounds[0] != 0 or not np.array_equal(np.diff(bounds), counts):
                raise PartError("its rows do not stand picture by picture")
            digests = rows["image_sha256"].take(pa.array(starts)).to_pylist()
            for digest, start, count in zip(digests, starts, counts, strict=True):
                self._places.setdefault(digest, Place(part, batch, int(start), int(count)))

    def of(self, pictures: Sequence[bytes]) -> pa.Table | None:
        """The rows of those encoded pictures that are here, each once; None if none is."""
        digests = dict.fromkeys(hashlib.sha256(data).digest() for data in pictures)
        places = [self._places[digest] for digest in digests if digest in self._places]
        wanted: dict[tuple[int, int], list[Place]] = {}
        for place in places:
            wanted.setdefault((place.part, place.batch), []).append(place)
        tables = []
        for at in sorted(wanted):
            rows = [np.arange(place.start, place.start + place.count) for place in wanted[at]]
            tables.append(self._batch(*at).take(pa.array(np.concatenate(rows))))
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def _batch(self, part: int, batch: int) -> pa.Table:
        """The last one stays: shards mostly keep their order."""
        if self._read is None or self._read[0] != (part, batch):
            self._read = None  # not kept while the next one is read
            table = self._parts[part].batch(batch, self._columns)
            self._read = ((part, batch), table.combine_chunks())
        return self._read[1]


def with_known(group: GroupRow, committed: CommittedRows | None) -> GroupRow:
    """The group with the committed rows of its pictures."""
    if committed is None:
        return group
    return replace(group, known=committed.of(group.samples["data"].to_pylist()))


@contextmanager
def committed_rows(
    shard: Shard, settings: PartSettings, fingerprint: str
) -> Iterator[CommittedRows | None]:
    """What the commit before has of this shard; None where there is none, or it cannot be trusted.

    A part that is missing, damaged or of another fingerprint costs work, not the shard: then a line
    of the log says so, and all pictures are computed.
    """
    if not shard.before:
        yield None
        return
    with ExitStack() as files:
        try:
            rows: CommittedRows | None = _open(shard, settings, fingerprint, files)
        except (PartError, OSError, UserError, pa.ArrowException) as error:
            logger.warning(
                "shard %s: nothing is taken over, all of it is computed again: %s",
                shown(shard.name), error,
            )  # fmt: skip
            rows = None
        yield rows


def _open(
    shard: Shard, settings: PartSettings, fingerprint: str, files: ExitStack
) -> CommittedRows:
    commit = read_replaced(shard.name, shard.before, settings.output, settings.storage)
    if commit.fingerprint != fingerprint:
        raise PartError(f"its commit has another fingerprint, {commit.fingerprint[:12]}")
    own = objects_of(commit)
    rows = CommittedRows(list(settings.features))
    for part in commit.parts:
        try:
            if any(published.path not in own for published in part.objects):
                raise PartError("not a name of this shard's parts")
            opened = open_part(part, settings.output, settings.layout, settings.storage)
            rows.add(files.enter_context(opened))
        except PartError as error:
            raise PartError(f"{part.path}: {error}") from error
    return rows
