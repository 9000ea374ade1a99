"""A query picture's vector, made as those of the index were: model, tiling, feature, choice.

The picture is a stranger's like any other: it is decoded in a process of its own.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jobs.recorded import matching_checkpoint, recorded_settings
from model.errors import UserError
from pipeline.commits import Dataset, read_dataset
from pipeline.index_record import IndexRecord
from pipeline.isolation import IsolatedDecoder, IsolationError
from pipeline.one_vector import ONE_OF_TILES
from pipeline.pictures import PictureError
from pipeline.storage import Storage, redact
from pipeline.tar_stream import MAX_MEMBER_BYTES
from pipeline.tiling import TilePlan, plan_tiles
from pipeline.versions import version_folder

if TYPE_CHECKING:
    from model.encoder import Encoder

DEADLINE_SECONDS = 60.0
# Of a recorded name that may lack what `redact` takes out, or have the escapes of `printable`.
REDACTED = re.compile(r"://|\\(x[0-9a-f]{2}|u[0-9a-f]{4}|[nrt])")
BATCH_TILES = 4  # one picture has few; on a GPU each size is compiled


class QueryEncoder:
    """The model that made OUTPUT, on this machine's GPU, or else its CPU.

    It is loaded for the first picture that can be decoded. Linux ends the decoder's process
    together with the thread that started it: one thread must ask for all vectors, and close this.
    """

    def __init__(self, record: IndexRecord, storage: Storage, model: str | None) -> None:
        """`model`: the checkpoint, where it is not what dataset.json names.

        Raises:
            UserError: OUTPUT is not what was indexed, or a setting is missing there.
        """
        self._record = record
        self._model = model
        self.dataset = indexed_dataset(record, storage)
        self._settings = recorded_settings(self.dataset, indexed_folder(record))
        self._tiling = self._settings.as_tiling()
        self._decoder = IsolatedDecoder(self._tiling, DEADLINE_SECONDS)

    def vector(self, data: bytes, name: str) -> npt.NDArray[np.float32]:
        """float32 [D] of an encoded picture.

        Raises:
            UserError: it cannot be decoded or embedded, and the message calls it `name`; or the
                checkpoint cannot be opened, has other weights, or cannot be computed with here.
        """
        tiles, plan = self._tiles(data, name)
        vectors = self._encoder.encode(tiles)[self._record.feature]  # [n, D]
        is_thumbnail = np.zeros(plan.tile_count, bool)
        is_thumbnail[-1] = plan.has_thumbnail
        choose = ONE_OF_TILES[self._record.vector]
        vector: npt.NDArray[np.float32] = choose(vectors, np.zeros(1, np.int64), is_thumbnail)[0]
        if not np.isfinite(vector).all():
            raise UserError(f"{name}: the model gives a value for it that is not finite")
        return vector

    def close(self) -> None:
        self._decoder.close()

    @cached_property
    def _encoder(self) -> Encoder:
        import torch  # seconds, which a picture that cannot be decoded need not wait

        from model.encoder import Encoder

        return Encoder.load(
            matching_checkpoint(self.dataset, self._model),
            dtype=self._settings.dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            layer=self._settings.layer,
            features=(self._record.feature,),
            batch_tiles=BATCH_TILES,
        )

    def _tiles(self, data: bytes, name: str) -> tuple[npt.NDArray[np.uint8], TilePlan]:
        side = self._tiling.tile_size
        try:
            plan = plan_tiles(*self._decoder.picture_size(data), self._tiling)
            tiles = np.empty((plan.tile_count, side, side, 3), np.uint8)
            self._decoder.cut_tiles(data, plan, tiles)
        except PictureError as error:
            raise UserError(f"{name}: {error}; give a picture that can be decoded") from error
        except IsolationError as error:
            raise UserError(str(error)) from error
        return tiles, plan


def indexed_folder(record: IndexRecord) -> str:
    """OUTPUT, or the version of it that was indexed."""
    return version_folder(record.output, record.version)


def indexed_dataset(record: IndexRecord, storage: Storage) -> Dataset:
    """What made the vectors of an index.

    Raises:
        UserError: OUTPUT is not there, or was made with other settings than what was indexed.
    """
    folder = indexed_folder(record)
    try:
        dataset = read_dataset(folder, storage)
    except UserError as error:
        if not REDACTED.search(record.output):
            raise
        raise UserError(
            f"{error}; INDEX has OUTPUT's name without user, password, query and control "
            "characters: if it has any, run `tessera index` with a name that has none"
        ) from error
    if dataset.fingerprint != record.fingerprint:
        raise UserError(
            f"{redact(folder)}: made with other settings since it was indexed; run `tessera index` "
            "again"
        )
    return dataset


def read_picture(path: Path) -> bytes:
    """An encoded picture from a file.

    Raises:
        UserError: it cannot be read, or is larger than a picture of a shard may be.
    """
    try:
        with path.open("rb") as source:
            data = source.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a picture") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: more than {MAX_MEMBER_BYTES >> 20} MiB; give a smaller picture")
    return data
