"""From a group of encoded samples to chunks of tiles.

A chunk is a run of tiles of one shard that travels together: one row, one block, one task of the
replica. Its boundaries follow from the pictures' headers alone, before any pixel is decoded, so a
picture that fails or runs out of time never moves the pictures behind it into another chunk.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.deadlines import HardLimit, deadline, hard_seconds
from pipeline.isolation import IsolationError
from pipeline.known import KnownPictures
from pipeline.records import (
    Head,
    Reject,
    Row,
    Seconds,
    from_ipc,
    maybe_from_ipc,
    maybe_to_ipc,
    one_row,
    rejects_table,
    tile_schema,
    to_ipc,
)
from pipeline.samples import GroupRow
from pipeline.tar_headers import shown
from pipeline.tiling import PictureError, TilePlan, Tiling, cut_tiles, picture_size, plan_tiles

logger = logging.getLogger(__name__)

# Of the features of a chunk. A replica holds them twice for a moment, and a few chunks wait between
# the stages: on a CPU in a buffer of 256 MiB. A picture that has more is a chunk of its own.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 128 << 20}


def chunk_tiles(most: int, tile_bytes: int, device: str) -> int:
    """Tiles of a chunk: `most`, or as many as have CHUNK_BYTES of features together."""
    return max(1, min(most, CHUNK_BYTES[device] // tile_bytes))


@dataclass(frozen=True)
class TileSettings:
    """deadline_seconds: most processor time one picture may take to decode and cut."""

    tiling: Tiling
    carry: tuple[str, ...]
    deadline_seconds: float
    chunk_tiles: int


@dataclass(frozen=True)
class Chunk:
    """Tiles [n, S, S, 3] uint8, a row of metadata for each, and the samples rejected so far.

    Rows whose features are known already have no tile: `known` has a line for each of them, its
    number (`row`) and the features.
    """

    head: Head
    rows: pa.Table
    rejects: pa.Table
    tiles: npt.NDArray[np.uint8]
    known: pa.Table | None = None

    def dump(self) -> Row:
        return one_row(
            head=self.head.dump(),
            rows=to_ipc(self.rows),
            rejects=to_ipc(self.rejects),
            known=maybe_to_ipc(self.known),
            tiles=self.tiles,
        )

    @staticmethod
    def load(row: Row) -> Chunk:
        return Chunk(
            Head.load(row["head"][0]),
            from_ipc(row["rows"][0]),
            from_ipc(row["rejects"][0]),
            row["tiles"][0],
            maybe_from_ipc(row["known"][0]),
        )


class Decoder(Protocol):
    """Where pictures are decoded: in this process, or apart (`pipeline.isolation`)."""

    def picture_size(self, data: bytes) -> tuple[int, int]: ...

    def cut_tiles(self, data: bytes, plan: TilePlan, out: npt.NDArray[np.uint8]) -> None: ...

    def pause(self) -> None:
        """To be called before anything else may take time."""


class DirectDecoder:
    """Decodes in this process, which ends when one call hangs (`hard_seconds`)."""

    def __init__(self, tiling: Tiling, deadline_seconds: float) -> None:
        self._tiling = tiling
        self._deadline_seconds = deadline_seconds
        self._limit = HardLimit(hard_seconds(deadline_seconds))

    def picture_size(self, data: bytes) -> tuple[int, int]:
        # No deadline: on a busy machine it would come at one attempt and not at the next, and the
        # chunks of the two would differ.
        self._limit.renew()
        return picture_size(data)

    def cut_tiles(self, data: bytes, plan: TilePlan, out: npt.NDArray[np.uint8]) -> None:
        self._limit.renew()
        with deadline(self._deadline_seconds):
            cut_tiles(data, self._tiling, plan, out)

    def pause(self) -> None:
        self._limit.cancel()


@dataclass(frozen=True)
class PlannedPicture:
    """A sample whose header could be read, and how it will be cut."""

    sample: dict[str, Any]
    plan: TilePlan


def tile_group(
    group: GroupRow, settings: TileSettings, decoder: Decoder | None = None
) -> Iterator[Chunk]:
    """Decodes and cuts the pictures of a group, but for those whose features are known.

    The last chunk carries the shard's end, if any.
    """
    began = time.perf_counter()
    decoder = decoder or DirectDecoder(settings.tiling, settings.deadline_seconds)
    planned, rejects = _plan(group, settings.tiling, decoder)
    runs = _runs(planned, settings.chunk_tiles)
    known = KnownPictures(group.known)

    def chunk(number: int, run: list[PlannedPicture]) -> Chunk:
        first, last = number == 0, number == len(runs) - 1
        rows, run_rejects, tiles, features = _cut(run, settings, decoder, known)
        before = [group.rejects, rejects_table(rejects)] if first else []
        seconds = Seconds(
            read=group.head.seconds.read if first else 0.0, tile=time.perf_counter() - began
        )
        head = replace(
            group.head,
            chunk=number,
            last_chunk=last,
            end=group.head.end if last else None,
            seconds=seconds,
        )
        return Chunk(head, rows, pa.concat_tables([*before, run_rejects]), tiles, features)

    for number, run in enumerate(runs):
        done = chunk(number, run)
        decoder.pause()
        yield done
        del done  # not kept while the next one is cut
        began = time.perf_counter()


def failed_group(group: GroupRow, settings: TileSettings, reason: str) -> Chunk:
    """One chunk without tiles, which says why the shard must not be committed."""
    side = settings.tiling.tile_size
    return Chunk(
        replace(group.head, last_chunk=True, failure=reason),
        tile_schema(settings.carry).empty_table(),
        rejects_table([]),
        np.empty((0, side, side, 3), np.uint8),
    )


def _plan(
    group: GroupRow, tiling: Tiling, decoder: Decoder
) -> tuple[list[PlannedPicture], list[Reject]]:
    planned, rejects = [], []
    for sample in group.samples.to_pylist():
        try:
            with _foreseen(sample):
                width, height = decoder.picture_size(sample["data"])
                planned.append(PlannedPicture(sample, plan_tiles(width, height, tiling)))
        except PictureError as error:
            rejects.append(_reject(sample, error))
    return planned, rejects


def _runs(planned: list[PlannedPicture], chunk_tiles: int) -> list[list[PlannedPicture]]:
    """Whole pictures, at most `chunk_tiles` tiles together; always at least one run.

    Known pictures count too: what is known may differ between two attempts, the chunks may not.
    """
    runs: list[list[PlannedPicture]] = [[]]
    filled = 0
    for picture in planned:
        if runs[-1] and filled + picture.plan.tile_count > chunk_tiles:
            runs.append([])
            filled = 0
        runs[-1].append(picture)
        filled += picture.plan.tile_count
    return runs


CountedTiles = list[int]


def count_chunks(tile_counts: CountedTiles, chunk_tiles: int) -> int:
    """How many chunks a group's pictures of so many tiles make: the rule of `_runs`."""
    chunks, filled, pictures = 1, 0, 0
    for count in tile_counts:
        if pictures and filled + count > chunk_tiles:
            chunks, filled, pictures = chunks + 1, 0, 0
        filled, pictures = filled + count, pictures + 1
    return chunks


def _cut(
    run: list[PlannedPicture], settings: TileSettings, decoder: Decoder, known: KnownPictures
) -> tuple[pa.Table, pa.Table, npt.NDArray[np.uint8], pa.Table | None]:
    side = settings.tiling.tile_size
    places = [known.rows_of(picture.sample["data"], picture.plan) for picture in run]
    unknown = [p.plan.tile_count for p, place in zip(run, places, strict=True) if place is None]
    tiles = np.empty((sum(unknown), side, side, 3), dtype=np.uint8)
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    known_here: list[int] = []
    known_there: list[int] = []
    filled = 0
    for picture, place in zip(run, places, strict=True):
        sample, plan = picture.sample, picture.plan
        out = tiles[filled : filled + plan.tile_count]
        try:
            with _foreseen(sample):
                if place is None:
                    decoder.cut_tiles(sample["data"], plan, out)
                picture_rows = _tile_rows(sample, plan, settings.carry)
        except PictureError as error:
            rejects.append(_reject(sample, error))
            continue
        if place is None:
            filled += plan.tile_count
        else:
            known_here += range(len(rows), len(rows) + plan.tile_count)
            known_there += place
        rows += picture_rows
    table = pa.Table.from_pylist(rows, tile_schema(settings.carry))
    features = known.features(known_here, known_there)
    return table, rejects_table(rejects), tiles[:filled], features


@contextmanager
def _foreseen(sample: dict[str, Any]) -> Iterator[None]:
    """What nobody has thought of costs the picture, not the job.

    That memory is short, or that no process starts, says nothing about the picture.
    """
    try:
        yield
    except (PictureError, MemoryError, IsolationError):
        raise
    except Exception as error:
        logger.exception("sample %s: unforeseen in tiling", shown(sample["key"]))
        message = f"{type(error).__name__}: {error}"[:200]
        raise PictureError("tile", "unforeseen", message) from error


def _tile_rows(
    sample: dict[str, Any], plan: TilePlan, carry: tuple[str, ...]
) -> list[dict[str, Any]]:
    digest = hashlib.sha256(sample["data"]).digest()
    shared = {
        "key": sample["key"],
        "sample_index": sample["sample_index"],
        "tile_count": plan.tile_count,
        "width": plan.width,
        "height": plan.height,
        "image_sha256": digest,
        **{name: sample[name] for name in carry},
    }
    return [
        {
            **shared,
            "tile_index": index,
            "is_thumbnail": plan.has_thumbnail and index == plan.tile_count - 1,
            "tile_box": box,
        }
        for index, box in enumerate(plan.boxes)
    ]


def _reject(sample: dict[str, Any], error: PictureError) -> Reject:
    return Reject(
        sample["key"],
        sample["sample_index"],
        sample["member"],
        error.stage,
        error.code,
        error.message,
    )
