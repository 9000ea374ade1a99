"""Committed rows of pictures that are still in a shard that has changed.

The reading task of such a shard copies the parts of the commit before to a nameless file on its
node, checks every byte against the commit, and learns which picture (by the sha256 of its encoded
bytes) stands where. Each group then gets the rows of its pictures along. Chunk boundaries do not
depend on what is found, so a repetition that finds less loses nothing.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from pipeline.audit_parts import PartError, copy_part
from pipeline.commits import Commit, PartFile
from pipeline.embedding import PartSettings
from pipeline.generations import objects_of
from pipeline.known import IDENTITY
from pipeline.records import Shard, embedding_schema
from pipeline.samples import GroupRow
from pipeline.storage import join
from pipeline.tar_headers import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The rows [start, start + count) of a row group are those of one picture."""

    part: int
    row_group: int
    start: int
    count: int


class CommittedRows:
    """Rows of verified parts, found by picture. Memory: a row group, and the places."""

    def __init__(self, features: Sequence[str]) -> None:
        self._columns = [*IDENTITY, *features]
        self._files: list[pq.ParquetFile] = []
        self._places: dict[bytes, Place] = {}
        self._read: tuple[tuple[int, int], pa.Table] | None = None

    def add(self, file: pq.ParquetFile) -> None:
        """Takes a part in.

        Raises:
            PartError: its rows are not in the order of pictures and tiles.
        """
        part = len(self._files)
        self._files.append(file)
        for row_group in range(file.num_row_groups):
            columns = ["image_sha256", "tile_index", "tile_count"]
            rows = file.read_row_group(row_group, columns=columns, use_threads=False)
            starts = np.flatnonzero(rows["tile_index"].to_numpy() == 0)
            counts = rows["tile_count"].to_numpy()[starts]
            bounds = np.append(starts, rows.num_rows)
            if bounds[0] != 0 or not np.array_equal(np.diff(bounds), counts):
                raise PartError("its rows do not stand picture by picture")
            digests = rows["image_sha256"].take(pa.array(starts)).to_pylist()
            for digest, start, count in zip(digests, starts, counts, strict=True):
                self._places.setdefault(digest, Place(part, row_group, int(start), int(count)))

    def of(self, pictures: Sequence[bytes]) -> pa.Table | None:
        """The rows of those encoded pictures that are here, each once; None if none is."""
        digests = dict.fromkeys(hashlib.sha256(data).digest() for data in pictures)
        places = [self._places[digest] for digest in digests if digest in self._places]
        wanted: dict[tuple[int, int], list[Place]] = {}
        for place in places:
            wanted.setdefault((place.part, place.row_group), []).append(place)
        tables = []
        for at in sorted(wanted):
            rows = [np.arange(place.start, place.start + place.count) for place in wanted[at]]
            tables.append(self._row_group(*at).take(pa.array(np.concatenate(rows))))
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def _row_group(self, part: int, row_group: int) -> pa.Table:
        """The last one stays: shards mostly keep their order."""
        if self._read is None or self._read[0] != (part, row_group):
            self._read = None  # not kept while the next one is read
            file = self._files[part]
            table = file.read_row_group(row_group, columns=self._columns, use_threads=False)
            self._read = ((part, row_group), table.combine_chunks())
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
    commit = Commit.parse(shard.before.encode(), shard.name)
    if commit.fingerprint != fingerprint:
        raise PartError(f"its commit has another fingerprint, {commit.fingerprint[:12]}")
    own = objects_of(commit)
    schema = embedding_schema(settings.features, settings.embedding_dtype, settings.carry)
    rows = CommittedRows(list(settings.features))
    for part in commit.parts:
        try:
            if part.path not in own:
                raise PartError("not a name of this shard's parts")
            rows.add(_open_part(part, schema, settings, files))
        except FileNotFoundError as error:
            raise PartError(f"{part.path}: missing") from error
        except PartError as error:
            raise PartError(f"{part.path}: {error}") from error
    return rows


def _open_part(
    part: PartFile, schema: pa.Schema, settings: PartSettings, files: ExitStack
) -> pq.ParquetFile:
    found = settings.storage.info(join(settings.output, part.path)).size
    if found != part.bytes:
        raise PartError(f"{found} bytes, the commit says {part.bytes}")
    copy = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 it is one
    copy_part(part, settings.output, settings.storage, copy)
    file = files.enter_context(pq.ParquetFile(Path(f"/dev/fd/{copy.fileno()}")))
    if not file.schema_arrow.equals(schema, check_metadata=False):
        raise PartError("its columns are not those of this OUTPUT")
    if file.metadata.num_rows != part.rows:
        raise PartError(f"{file.metadata.num_rows} rows, the commit says {part.rows}")
    return file
