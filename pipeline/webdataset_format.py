"""Parts as tars in WebDataset's convention: `<key>.json`, then `<key>.<tile>.npy` tile by tile.

The same rows give the same bytes: members have no time, no owner, one mode, and the rows' order.
"""

from __future__ import annotations

import base64
import io
import json
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.layout import Layout, tile_bytes
from pipeline.npy_format import npy_header
from pipeline.part_copies import OpenPart, PartError, Sink
from pipeline.records import Shape, carried_field
from pipeline.samples import split_name
from pipeline.tar_names import MemberKeys, extension
from pipeline.vectors import feature_values, vectors

BATCH_BYTES = 8 << 20
MODE = 0o644
# What comes of a JSON that is none, or has not what it should have.
UNREADABLE = (
    KeyError, TypeError, ValueError, AttributeError, RecursionError, pa.ArrowException
)  # fmt: skip
BLOCK = tarfile.BLOCKSIZE
# Of the sample, once; of its tiles, in lists.
PICTURE_FIELDS = ("key", "sample_index", "tile_count", "width", "height", "image_sha256")
TILE_LISTS = ("is_thumbnail", "tile_box")


def write_tar(sink: Sink, tables: Iterator[pa.Table], layout: Layout) -> int:
    """Writes whole pictures, a table at a time; gives the number of rows."""
    keys = MemberKeys()
    num_bytes, rows = 0, 0
    for table in tables:
        for member in _members(table, layout, keys):
            for piece in member:
                sink.write(piece)
                num_bytes += len(piece)
        rows += table.num_rows
    end = num_bytes + 2 * BLOCK  # two empty blocks, and a whole number of records as tar has it
    sink.write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
    return rows


def tar_overhead(layout: Layout, tiles: int, pictures: int) -> int:
    """Bytes of headers and padding of so many tiles and pictures; some 1 KiB for each JSON."""
    overhead = 0
    for shape in layout.features.values():
        header = len(npy_header(_array_shape(shape), layout.embedding_dtype))
        values = tile_bytes({"": shape}, layout.embedding_dtype)
        overhead += BLOCK + header + -(header + values) % BLOCK
    return tiles * overhead + pictures * 2 * BLOCK


def _members(table: pa.Table, layout: Layout, keys: MemberKeys) -> Iterator[tuple[Any, ...]]:
    """Header, content and padding of each member."""
    features = {name: _bytes_of_tiles(table, name, layout) for name in layout.features}
    headers = {
        name: npy_header(_array_shape(shape), layout.embedding_dtype)
        for name, shape in layout.features.items()
    }
    small = table.drop_columns(list(features)).to_pylist()
    start = 0
    while start < len(small):
        picture = small[start : start + small[start]["tile_count"]]
        name = keys.name(picture[0]["key"], picture[0]["sample_index"])
        document = json.dumps(_document(picture, layout.carry), separators=(",", ":")).encode()
        yield member_header(f"{name}.json", len(document)), document, _padding(len(document))
        for tile in range(len(picture)):
            for feature, values in features.items():
                array, header = values[start + tile], headers[feature]
                size = len(header) + len(array)
                member = f"{name}.{extension(tile, feature, len(features))}"
                yield member_header(member, size) + header, array, _padding(size)
        start += len(picture)


def _bytes_of_tiles(table: pa.Table, name: str, layout: Layout) -> list[memoryview]:
    """The values of each tile, without a copy."""
    width = layout.schema.field(name).type.list_size
    return [tile.data.cast("B") for tile in feature_values(table[name], width)]


def _array_shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _document(picture: Sequence[dict[str, Any]], carry: Sequence[str]) -> dict[str, Any]:
    """A picture's rows as its JSON; bytes as base64, the sha256 in hexadecimal."""
    first = picture[0]
    carried = {
        name: base64.b64encode(first[name]).decode()
        if isinstance(first[name], bytes)
        else first[name]
        for name in carry
    }
    return {
        **{name: first[name] for name in PICTURE_FIELDS},
        "image_sha256": first["image_sha256"].hex(),
        **{name: [tile[name] for tile in picture] for name in TILE_LISTS},
        **carried,
    }


def member_header(name: str, size: int) -> bytes:
    """POSIX's, with an extended one before it where the name is long or not ASCII."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = MODE
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


@dataclass(frozen=True)
class Member:
    """Where the content of a member lies."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class StoredSample:
    """Where the JSON of a picture is, and the arrays of its tiles, feature by feature."""

    document: Member
    arrays: tuple[Member, ...]


class TarPart(OpenPart):
    """A batch is a run of pictures of together at most BATCH_BYTES, or one."""

    def __init__(self, data: mmap.mmap, samples: Sequence[StoredSample], layout: Layout) -> None:
        self._data = data
        self._layout = layout
        self._schema = layout.schema
        self._headers = {
            name: npy_header(_array_shape(shape), layout.embedding_dtype)
            for name, shape in layout.features.items()
        }
        self._batches = list(_runs(samples, len(layout.features)))
        self.num_batches = len(self._batches)

    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        names = self._schema.names if columns is None else list(columns)
        samples = self._batches[number]
        features = [name for name in names if name in self._layout.features]
        try:
            rows = self._rows(samples, [name for name in names if name not in features])
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise PartError(
                f"{samples[0].document.name}: not what it should be: {reason}"
            ) from error
        for name in features:
            rows = rows.append_column(name, vectors(self._values(samples, name)))
        return rows.select(names)

    def _rows(self, samples: Sequence[StoredSample], names: Sequence[str]) -> pa.Table:
        """The columns that come from the JSON."""
        rows: list[dict[str, Any]] = []
        for sample in samples:
            start, end = sample.document.start, sample.document.start + sample.document.size
            document = json.loads(self._data[start:end])
            count = document["tile_count"]
            if count * len(self._layout.features) != len(sample.arrays):
                raise ValueError(f"tile_count {count}, and {len(sample.arrays)} arrays")
            document["image_sha256"] = bytes.fromhex(document["image_sha256"])
            for name in self._layout.carry:
                if pa.types.is_binary(carried_field(name).type) and document[name] is not None:
                    document[name] = base64.b64decode(document[name], validate=True)
            boxes, thumbnails = document.pop("tile_box"), document.pop("is_thumbnail")
            rows += [
                {**document, "tile_index": tile, "tile_box": box, "is_thumbnail": is_thumbnail}
                for tile, box, is_thumbnail in zip(range(count), boxes, thumbnails, strict=True)
            ]
        columns = {name: [row[name] for row in rows] for name in names}
        schema = pa.schema([self._schema.field(name) for name in names])
        if not names:
            return pa.table({"sample_index": [row["sample_index"] for row in rows]}).select([])
        return pa.table(columns, schema=schema)

    def _values(self, samples: Sequence[StoredSample], feature: str) -> Any:
        """A feature of all tiles of some samples, [n, D]."""
        header = self._headers[feature]
        width = self._schema.field(feature).type.list_size
        kind = np.dtype(self._layout.embedding_dtype)
        size = len(header) + width * kind.itemsize
        at, step = list(self._layout.features).index(feature), len(self._layout.features)
        members = [member for sample in samples for member in sample.arrays[at::step]]
        values = np.empty((len(members), width), kind)
        for row, member in enumerate(members):
            begin = member.start + len(header)
            if member.size != size or self._data[member.start : begin] != header:
                raise PartError(f"{member.name}: not an array of {feature}")
            values[row] = np.frombuffer(self._data, kind, width, begin)
        return values


def _runs(samples: Sequence[StoredSample], num_features: int) -> Iterator[list[StoredSample]]:
    run: list[StoredSample] = []
    filled = 0
    for sample in samples:
        # A table repeats what the JSON has for every tile.
        documents = sample.document.size * (len(sample.arrays) // num_features)
        num_bytes = documents + sum(member.size for member in sample.arrays)
        if run and filled + num_bytes > BATCH_BYTES:
            yield run
            run, filled = [], 0
        run.append(sample)
        filled += num_bytes
    if run:
        yield run


@contextmanager
def open_tar(local: Path, layout: Layout, rows: int) -> Iterator[TarPart]:
    """Raises PartError: not a tar of the layout's members, or another number of rows."""
    try:
        with tarfile.open(local, "r:") as archive:
            samples = list(_samples(archive, layout))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise PartError(f"cannot be read as a tar: {error}") from error
    found = sum(len(sample.arrays) for sample in samples) // len(layout.features)
    if found != rows:
        raise PartError(f"{found} rows, the commit says {rows}")
    with local.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        yield TarPart(data, samples, layout)


def _samples(archive: tarfile.TarFile, layout: Layout) -> Iterator[StoredSample]:
    features = list(layout.features)
    document: Member | None = None
    arrays: list[Member] = []
    while (entry := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        member = Member(entry.name, entry.offset_data, entry.size)
        key, kind = split_name(entry.name) or ("", "")
        if kind == "json":
            if document is not None:
                yield StoredSample(document, tuple(arrays))
            document, arrays = member, []
            continue
        tile, at = divmod(len(arrays), len(features))
        due = extension(tile, features[at], len(features))
        if document is None or f"{key}.json" != document.name or kind != due:
            raise PartError(f"member {entry.name!r} where another is due")
        arrays.append(member)
    if document is not None:
        yield StoredSample(document, tuple(arrays))


def documents_at_head(head: bytes) -> Iterator[dict[str, Any]]:
    """What the JSON members say of which the first bytes of a part have the whole."""
    with suppress(tarfile.ReadError), tarfile.open(fileobj=io.BytesIO(head), mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            end = entry.offset_data + entry.size
            if entry.name.endswith(".json") and end <= len(head):
                yield json.loads(head[entry.offset_data : end])
