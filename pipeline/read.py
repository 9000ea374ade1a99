"""Reads what is in OUTPUT: committed shards only, each as one commit has it, whole.

`committed` names the shards, `dataset` is for pyarrow, DuckDB and pandas, `pictures` puts the tiles
of each picture together, `vectors` makes one vector of them. `pipeline.joined` and
`pipeline.torch_dataset` add the samples of the source. All are snapshots of the version that
`current.json` names when they are called, and say what is wrong with a call at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from model.errors import UserError
from pipeline import s3
from pipeline.audit_parts import run_starts
from pipeline.commits import (
    SIDE_BY_SIDE,
    Dataset,
    commit_url,
    committed_shards,
    read_dataset,
)
from pipeline.layout import Layout, layout_of
from pipeline.one_vector import ONE_OF_TILES, VECTOR_CHOICES, Floats, Integers, VectorChoice
from pipeline.open_shards import OpenShard, commit_now, open_shard
from pipeline.printable import printable
from pipeline.records import TILE_FIELDS, num_values, shown_shape
from pipeline.sources import WORTH_A_LISTING
from pipeline.storage import Storage, explained, join, redact
from pipeline.vectors import feature_values
from pipeline.versions import current_version, version_folder

if TYPE_CHECKING:
    import pyarrow.dataset as pds

LOCAL = Storage()

OF_PICTURE = ("key", "sample_index", "width", "height", "image_sha256")
OF_TILE = ("is_thumbnail", "tile_box")


@dataclass(frozen=True)
class Output:
    """What is read: `folder` is OUTPUT (`version` None) or its current version, whose
    `dataset.json` was read."""

    version: str | None
    folder: str
    dataset: Dataset
    storage: Storage

    def features(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """The features asked for, or all.

        Raises:
            UserError: one is not there.
        """
        there = self.dataset.features
        for name in asked or ():
            if name not in there:
                raise UserError(
                    f"{redact(self.folder)}: no feature {name}; it has {', '.join(there)}"
                )
        return tuple(there if asked is None else asked)

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(self.dataset.settings["carry"])

    def width(self, feature: str) -> int:
        """D of a feature that is one vector a tile.

        Raises:
            UserError: it is not there, or is many a tile (`tokens`).
        """
        self.features([feature])
        shape = self.dataset.features[feature]
        if isinstance(shape, int):
            return shape
        raise UserError(
            f"{redact(self.folder)}: feature {feature} is {shown_shape(shape)} values a tile, no "
            "vector; choose `cls` or `mean`"
        )

    def shards(self, asked: Sequence[str] | None = None) -> list[str]:
        """The shards asked for, or all that are committed in the folder now, sorted.

        Raises:
            UserError: one is not committed.
        """
        with explained("list", self.folder):
            if asked is None:
                return sorted(committed_shards(self.folder, self.storage))
            if len(asked) < WORTH_A_LISTING:
                there = {n for n in asked if self.storage.exists(commit_url(self.folder, n))}
            else:
                there = committed_shards(self.folder, self.storage)
        for name in asked:
            if name not in there:
                raise UserError(
                    printable(
                        f"{redact(self.folder)}: shard {name} is not committed; check its name"
                    )
                )
        return list(asked)

    def open(self, shard: str) -> AbstractContextManager[OpenShard | None]:
        """The shard as its commit has it now; see `open_shard`."""
        return open_shard(self.folder, self.layout, shard, self.storage)

    def open_each(self, shards: Sequence[str]) -> Iterator[OpenShard]:
        """These shards, each open until the next; those that have vanished are left out."""
        for name in shards:
            with self.open(name) as shard:
                if shard is not None:
                    yield shard

    @property
    def layout(self) -> Layout:
        """What rows it has: docs/output.md."""
        return layout_of(self.dataset)


@dataclass(frozen=True)
class Picture:
    """One picture and all its n tiles, in order; a thumbnail is the last.

    `features` are [n, D] (`tokens`: [n, tokens, D]) in the type they are stored in, `tile_boxes`
    [n, 4] (left, top, right, bottom in pixels of the picture), `is_thumbnail` [n]; `carried` has
    null members as None.
    """

    shard: str
    key: str
    sample_index: int
    width: int
    height: int
    image_sha256: bytes
    is_thumbnail: npt.NDArray[np.bool_]
    tile_boxes: npt.NDArray[np.float32]
    features: Mapping[str, Floats]
    carried: Mapping[str, str | bytes | None]


@dataclass(frozen=True)
class Vectors:
    """One vector a picture, of a run of pictures of one shard: `values` is [n, D] float32.

    `pictures` has the columns `key`, `sample_index` and those carried that were asked for.
    """

    shard: str
    pictures: pa.Table
    values: Floats


def open_output(output: str, storage: Storage = LOCAL) -> Output:
    """Which folder is read, and what made it.

    Raises:
        UserError: OUTPUT is none, or cannot be read.
    """
    version = current_version(output, storage)
    folder = version_folder(output, version)
    return Output(version, folder, read_dataset(folder, storage), storage)


def committed(output: str, storage: Storage = LOCAL) -> list[str]:
    """Names of the committed shards, sorted. Several processes that divide them should be given one
    list: while a run is on, two listings may differ.

    Raises:
        UserError: OUTPUT is none, or cannot be read.
    """
    return open_output(output, storage).shards()


def dataset(output: str, storage: Storage = LOCAL) -> pds.Dataset:
    """The parts that the commits name, as a pyarrow dataset; a row per tile.

    A scan that comes to a shard which has been replaced meanwhile ends with FileNotFoundError: it
    never mixes. Call this again then.

    Raises:
        UserError: OUTPUT is none, or its format is not Parquet.
    """
    import pyarrow.dataset as pds  # here: it loads pandas, which the other readers do without

    opened = open_output(output, storage)
    if opened.layout.format != "parquet":
        raise UserError(
            f"{redact(opened.folder)}: {opened.layout.format}, no Parquet; use `pictures`"
        )
    shards = opened.shards()
    with explained("read", opened.folder), ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        commits = pool.map(lambda shard: commit_now(opened.folder, shard, storage), shards)
        parts = [part for commit in commits if commit is not None for part in commit.parts]
        fs, root = storage.open(opened.folder)
    if s3.is_s3(fs):  # `Storage` asks once and tries again by itself; pyarrow does not
        fs = type(fs)(**{**fs.storage_options, "skip_instance_cache": True})
    paths = [join(root, part.path) for part in parts]
    return pds.FileSystemDataset.from_paths(
        paths,
        schema=opened.layout.schema,
        format=pds.ParquetFileFormat(),
        filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)),
    )


def pictures(
    output: str,
    storage: Storage = LOCAL,
    shards: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
) -> Iterator[Picture]:
    """The pictures of these shards (all committed ones) with their tiles put together, in order.

    A shard that vanishes meanwhile is left out. Memory: one row group.

    Raises:
        UserError: OUTPUT, a shard or a feature is not there, or a part is damaged.
    """
    opened = open_output(output, storage)
    columns = opened.features(features)
    names = opened.shards(shards)
    return (
        picture
        for shard in opened.open_each(names)
        for picture in shard_pictures(shard, opened, columns)
    )


def shard_pictures(shard: OpenShard, output: Output, features: Sequence[str]) -> Iterator[Picture]:
    """The pictures of an open shard."""
    names = [*(field.name for field in TILE_FIELDS), *features, *output.carried]
    for rows in picture_rows(shard.tables(names)):
        starts = picture_starts(rows)
        small = [*OF_PICTURE, *output.carried]
        own = rows.select(small).take(pa.array(starts)).to_pylist()
        boxes = feature_values(rows["tile_box"], 4).astype(np.float32, copy=False)
        thumbnails = rows["is_thumbnail"].to_numpy()
        values = {name: _values(rows, name, output) for name in features}
        ends = [*starts[1:].tolist(), rows.num_rows]
        for fields, start, end in zip(own, starts.tolist(), ends, strict=True):
            yield Picture(
                shard=shard.commit.shard,
                **{name: fields[name] for name in OF_PICTURE},
                is_thumbnail=thumbnails[start:end],
                tile_boxes=boxes[start:end],
                features={name: array[start:end] for name, array in values.items()},
                carried={name: fields[name] for name in output.carried},
            )


def vectors(
    output: str,
    feature: str,
    choice: VectorChoice = "thumbnail",
    storage: Storage = LOCAL,
    shards: Sequence[str] | None = None,
    carried: Sequence[str] = (),
) -> Iterator[Vectors]:
    """One vector a picture, in order, run by run.

    Args:
        choice: `thumbnail`: of the whole picture as one tile, which of a picture with one tile is
            that tile; `mean`: of all its tiles, the thumbnail among them; `first`: its first tile.
        carried: columns to give along.

    Raises:
        UserError: OUTPUT, a shard, the feature or a column is not there, or no such choice;
            `thumbnail`, and it was made without.
    """
    opened = open_output(output, storage)
    opened.width(feature)
    check_choice(opened, choice)
    there = opened.layout.schema.names
    for name in carried:
        if name not in there:
            raise UserError(f"{redact(opened.folder)}: no column {name}; it has {', '.join(there)}")
    names = opened.shards(shards)
    return (
        replace(run, values=_own_float32(run.values))
        for shard in opened.open_each(names)
        for run in shard_vectors(shard, opened, feature, choice, carried)
    )


def shard_vectors(
    shard: OpenShard,
    output: Output,
    feature: str,
    choice: VectorChoice,
    carried: Sequence[str] = (),
) -> Iterator[Vectors]:
    """One vector a picture, of an open shard; `values` in the type they are stored in, means in
    float32."""
    names = ["key", "sample_index", "tile_count", "is_thumbnail", feature, *carried]
    for rows in picture_rows(shard.tables(names)):
        starts = picture_starts(rows)
        values = ONE_OF_TILES[choice](
            _values(rows, feature, output), starts, rows["is_thumbnail"].to_numpy()
        )
        small = rows.select(["key", "sample_index", *carried]).take(pa.array(starts))
        yield Vectors(shard.commit.shard, small, values)


def one_vector(picture: Picture, feature: str, choice: VectorChoice) -> npt.NDArray[np.float32]:
    """The vector [D] of a picture; see `vectors`."""
    values = picture.features[feature]
    chosen = ONE_OF_TILES[choice](values, np.zeros(1, np.int64), picture.is_thumbnail)
    vector: npt.NDArray[np.float32] = chosen[0].astype(np.float32, copy=False)
    return vector


def check_choice(output: Output, choice: VectorChoice) -> None:
    """Refuses what is no choice, and `thumbnail` where pictures of several tiles have none."""
    if choice not in VECTOR_CHOICES:
        raise UserError(f"no vector {choice}; choose one of {', '.join(VECTOR_CHOICES)}")
    settings = output.dataset.settings
    has_thumbnails = settings["tiling"] != "dynamic" or settings.get("thumbnail") is True
    if choice == "thumbnail" and not has_thumbnails:
        raise UserError(
            f"{redact(output.folder)}: not made with `thumbnail: true`; choose `mean` or `first`"
        )


def picture_rows(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of whole pictures: one may go on in the next table.

    Raises:
        UserError: tiles of the last picture are missing.
    """
    rest: pa.Table | None = None
    for table in tables:
        rows = table if rest is None else pa.concat_tables([rest, table])
        if not rows.num_rows:
            continue
        last = int(picture_starts(rows)[-1])
        is_whole = rows.num_rows - last >= rows["tile_count"][last].as_py()
        rest = None if is_whole else rows.slice(last)
        if is_whole or last:
            yield rows if is_whole else rows.slice(0, last)
    if rest is not None:
        key, there, tiles = rest["key"][0], rest.num_rows, rest["tile_count"][0]
        raise UserError(printable(f"picture {key}: {there} of {tiles} tiles; see `tessera verify`"))


def picture_starts(rows: pa.Table) -> Integers:
    """Where in the rows a picture begins."""
    return run_starts(rows["sample_index"].to_numpy())


def _own_float32(values: Floats) -> npt.NDArray[np.float32]:
    """The caller may change them: never a view of what Arrow holds."""
    return values.astype(np.float32, copy=not values.flags.writeable)


def _values(rows: pa.Table, feature: str, output: Output) -> Floats:
    """[n, D], or [n, tokens, D]."""
    shape = output.dataset.features[feature]
    values = feature_values(rows[feature], num_values(shape))
    return values if isinstance(shape, int) else values.reshape(-1, *shape)
