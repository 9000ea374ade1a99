"""The plain records that travel between stages, and the schemas of what is written.

Legend: n tiles in a chunk, S tile side in pixels, D hidden size of the model.
Big fields travel as Arrow IPC bytes or as one contiguous array; small ones as JSON in `head`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 1

# What one sample looks like between reading and tiling; carried columns follow.
SAMPLE_FIELDS = [
    pa.field("key", pa.string()),
    pa.field("sample_index", pa.int32()),
    pa.field("member", pa.string()),
    pa.field("data", pa.binary()),
]

# docs/output.md: one row per tile; features and carried columns follow.
TILE_FIELDS = [
    pa.field("key", pa.string()),
    pa.field("sample_index", pa.int32()),
    pa.field("tile_index", pa.int16()),
    pa.field("tile_count", pa.int16()),
    pa.field("is_thumbnail", pa.bool_()),
    pa.field("tile_box", pa.list_(pa.float32(), 4)),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("image_sha256", pa.binary(32)),
]

REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("sample_index", pa.int32()),
        pa.field("member", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("error", pa.string()),
        pa.field("message", pa.string()),
    ]
)

# Members known to hold text become `string` columns; every other carried member is `binary`.
TEXT_EXTENSIONS = frozenset({"txt", "text", "caption", "json", "url", "cls", "md", "html", "csv"})

Row = dict[str, npt.NDArray[Any]]

# What a feature is of one tile: D values, or tokens x D of them.
Shape = int | tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """One input tar. `name` is its path below the input's folder, without `.tar`.

    `before` marks the commit that this shard's next one replaces (pipeline/replaced.py); "" where
    there is none.
    """

    url: str
    name: str
    before: str = ""


@dataclass(frozen=True)
class Reject:
    """A sample that gave no embedding, and why. `error` is a stable short code."""

    key: str
    sample_index: int
    member: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class Seconds:
    """Time spent in each stage, summed over the tasks of one shard."""

    read: float = 0.0
    tile: float = 0.0
    embed: float = 0.0
    write: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.read + other.read,
            self.tile + other.tile,
            self.embed + other.embed,
            self.write + other.write,
        )


@dataclass(frozen=True, order=True)
class Compute:
    """What a replica came to where an option left it the choice: recorded, as it decides bits.

    `device` is "cpu" or the GPU's name.
    """

    device: str
    tensor_parallel: int
    attention: str
    batch_tiles: int


@dataclass(frozen=True)
class Work:
    """What a replica did for one chunk, and how long it had computed nothing before.

    `replica` is the identity of one process on `node`: one that starts again is another. `tiles`
    counts all it was given, `starved_seconds` goes back to the end of its chunk before, or of its
    start.
    """

    node: str
    replica: str
    tiles: int
    seconds: float
    starved_seconds: float


@dataclass(frozen=True)
class ShardEnd:
    """What the reader knows once it has seen the whole shard.

    `failure` says why the shard must not be committed; `truncated_at` is the byte at which the
    archive breaks off when that was accepted.
    """

    samples: int
    size: int
    etag: str | None
    truncated_at: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Head:
    """The small fields of every row: whose run of samples or tiles this is.

    `version` is the object that was read, as the store calls it. `failure` says why nothing came of
    this run, so that its shard must not be committed.
    `tile_deaths` and `embed_deaths` are the workers and replicas that died over it before.
    """

    shard: str
    url: str
    group: int
    chunk: int = 0
    last_chunk: bool = False
    end: ShardEnd | None = None
    seconds: Seconds = field(default_factory=Seconds)
    compute: Compute | None = None
    work: Work | None = None
    tile_deaths: int = 0
    embed_deaths: int = 0
    version: str = ""
    failure: str | None = None

    @property
    def chunk_id(self) -> str:
        return f"{self.shard} {self.group:06d}-{self.chunk:06d}"

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def load(data: bytes) -> Head:
        fields = json.loads(data)
        end, compute, work = fields.pop("end"), fields.pop("compute"), fields.pop("work")
        return Head(
            **{**fields, "seconds": Seconds(**fields["seconds"])},
            end=None if end is None else ShardEnd(**end),
            compute=None if compute is None else Compute(**compute),
            work=None if work is None else Work(**work),
        )


@dataclass(frozen=True)
class Part:
    """The small row that the driver sees for a chunk that was written.

    `rejects` counts them by `stage/code`, `tile_counts` the pictures by their number of tiles. A
    part that could not be written says why in `failure`. `crc32` is that of the file. `reused` of
    the tiles were not computed but taken over.
    """

    head: Head
    file: str
    samples: int
    tiles: int
    rejects: Mapping[str, int]
    num_bytes: int
    failure: str | None = None
    crc32: int = 0
    reused: int = 0
    tile_counts: Mapping[str, int] = field(default_factory=dict)

    def dump(self) -> bytes:
        return json.dumps({**asdict(self), "head": self.head.dump().decode()}).encode()

    @staticmethod
    def load(data: bytes) -> Part:
        fields = json.loads(data)
        return Part(**{**fields, "head": Head.load(fields["head"].encode())})


def carried_field(name: str) -> pa.Field:
    """The column of a carried member: `txt`, or `json:url` for one field of a JSON member."""
    extension, _, json_field = name.partition(":")
    is_text = bool(json_field) or extension in TEXT_EXTENSIONS
    return pa.field(name, pa.string() if is_text else pa.binary())


def sample_schema(carry: tuple[str, ...]) -> pa.Schema:
    return pa.schema([*SAMPLE_FIELDS, *map(carried_field, carry)])


def tile_schema(carry: tuple[str, ...]) -> pa.Schema:
    """Rows of a chunk before its embeddings are known."""
    return pa.schema([*TILE_FIELDS, *map(carried_field, carry)])


def num_values(shape: Shape) -> int:
    """How many values a tile has of a feature."""
    return shape if isinstance(shape, int) else shape[0] * shape[1]


def shown_shape(shape: Shape) -> str:
    """`[3200]`, or `[1025, 3200]`."""
    return f"[{shape}]" if isinstance(shape, int) else f"[{shape[0]}, {shape[1]}]"


def embedding_schema(
    features: Mapping[str, Shape], embedding_dtype: str, carry: tuple[str, ...]
) -> pa.Schema:
    """Rows of an output shard. A feature of tokens is one flat list, token after token."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[embedding_dtype]
    columns = [
        pa.field(name, pa.list_(value, num_values(shape))) for name, shape in features.items()
    ]
    return pa.schema([*TILE_FIELDS, *columns, *map(carried_field, carry)])


def rejects_table(rejects: list[Reject]) -> pa.Table:
    return pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)


def to_ipc(table: pa.Table) -> bytes:
    return bytes(to_ipc_buffer(table))


def to_ipc_buffer(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def from_ipc(data: bytes | npt.NDArray[np.uint8]) -> pa.Table:
    """A table that lies in `data`; nothing is copied."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all()


def maybe_to_ipc(table: pa.Table | None) -> bytes:
    return b"" if table is None else to_ipc(table)


def maybe_from_ipc(data: bytes) -> pa.Table | None:
    return from_ipc(data) if data else None


def one_row(**columns: bytes | npt.NDArray[Any]) -> Row:
    """One Ray Data row. Bytes go into object arrays: numpy's own `S` type drops trailing zeros."""
    row: Row = {}
    for name, value in columns.items():
        if isinstance(value, bytes):
            column = np.empty(1, dtype=object)
            column[0] = value
            row[name] = column
        else:
            row[name] = value[np.newaxis]
    return row
