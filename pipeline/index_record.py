"""What an index is on storage: `index.json`, put last, names all else that belongs to it.

    INDEX/
      index.json                     which commits of OUTPUT it holds, and how
      segments/<name>.faiss          the vectors of a group of shards, as FAISS writes them
      segments/<name>.parquet        key, shard, sample_index and caption of each, in that order
      segments/<name>.nearest.parquet  what exact search finds in each shard for the model's queries
      segments/<name>.found.parquet  what it finds in all that is live, and what the index finds
      segments/<name>.json           put last of a segment: it is whole
      models/<name>.faiss            what all segments share, where the kind is trained
      models/<name>.queries.parquet  vectors that recall is measured with
      models/<name>.json             put last of a model

Names are digests of all that decides the content, so what a killed run had made is found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar, get_args

import pyarrow as pa
from pydantic import ConfigDict, Field

from model.errors import UserError
from pipeline.commits import Commit, Record, Time
from pipeline.one_vector import VectorChoice
from pipeline.storage import Storage, explained, join, redact

RECORD = "index.json"
SEGMENTS = "segments"
MODELS = "models"
INDEX_SCHEMA_VERSION = 2

Kind = Literal["flat", "hnsw", "ivf-pq"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Carried members that are a picture's caption, the likeliest first.
CAPTIONS = ("txt", "caption", "text", "json:caption", "json:text")

PICTURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.dictionary(pa.int32(), pa.string())),
        pa.field("sample_index", pa.int32()),
        pa.field("caption", pa.string()),
    ]
)


class IndexFile(Record):
    """One published object, by its path below INDEX."""

    path: str
    bytes: int
    sha256: str


class Flat(Record):
    """Exact: every vector is compared, in float32."""

    kind: Literal["flat"] = "flat"


class Hnsw(Record):
    """A graph over float16 vectors: `links` of each, and how many candidates are looked at."""

    kind: Literal["hnsw"] = "hnsw"
    links: int
    build_breadth: int
    search_breadth: int


class IvfPq(Record):
    """Vectors are reduced to `dimensions` (principal axes, turned at random), put into one of
    `lists` and kept there as product codes of 4 bits for two dimensions. Of `probes` lists the best
    `candidates` are compared again by codes of 8 bits for each dimension of the whole vector.

    Trained on `sample` vectors.
    """

    kind: Literal["ivf-pq"] = "ivf-pq"
    dimensions: int
    lists: int
    probes: int
    candidates: int
    sample: int


Parameters = Annotated[Flat | Hnsw | IvfPq, Field(discriminator="kind")]


class Model(Record):
    """What the segments share: `trained` (None where nothing is) and the queries of recall."""

    name: str
    trained: IndexFile | None
    queries: IndexFile

    @property
    def json_path(self) -> str:
        return f"{model_path(self.name)}.json"

    @property
    def files(self) -> tuple[IndexFile, ...]:
        return (self.queries,) if self.trained is None else (self.queries, self.trained)


class IndexedShard(Record):
    """A shard as it is in a segment: its vectors have the ids [start, start + count) there.

    `commit` is the digest of the commit they come from (`commit_digest`). Vectors that are not
    `live` are those of a commit that is no more; no search returns them.
    """

    shard: str
    commit: str
    start: int
    count: int
    live: bool = True


class Segment(Record):
    """The vectors of a group of shards. `name` is a digest of all that decides its content, but for
    `found`, which is of what is live."""

    name: str
    index: IndexFile
    pictures: IndexFile
    nearest: IndexFile
    found: IndexFile
    shards: tuple[IndexedShard, ...]

    @property
    def json_path(self) -> str:
        return f"{segment_path(self.name)}.json"

    @property
    def files(self) -> tuple[IndexFile, ...]:
        return self.index, self.pictures, self.nearest, self.found

    @property
    def vectors(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def live_vectors(self) -> int:
        return sum(shard.count for shard in self.shards if shard.live)


P = TypeVar("P", Segment, Model)


class Recall(Record):
    """The share of the `neighbors` nearest by exact search that the index finds, over `queries`."""

    value: float
    neighbors: int
    queries: int


class IndexRecord(Record):
    """The commit record of an index.

    `output` is OUTPUT as it was given, `version` what its `current.json` named (None: OUTPUT
    itself), `fingerprint` that of its `dataset.json`. `vector` says how a picture's tiles became
    one vector of `width` values of `feature`. `caption` is the carried member that is shown as one.
    `feature_chosen`: by the user, not as the first; `kind_chosen`: not by the number of vectors.
    """

    schema_version: int
    output: str
    version: str | None
    fingerprint: str
    feature: str
    feature_chosen: bool
    vector: VectorChoice
    width: int
    caption: str | None
    kind_chosen: bool
    parameters: Parameters
    model: Model
    segments: tuple[Segment, ...]
    recall: Recall | None
    made_at: Time

    @property
    def kind(self) -> Kind:
        return self.parameters.kind

    @property
    def live_vectors(self) -> int:
        return sum(segment.live_vectors for segment in self.segments)

    @property
    def files(self) -> list[IndexFile]:
        """All that belongs to the index, but for the small records beside them."""
        of_segments = (file for segment in self.segments for file in segment.files)
        return [*self.model.files, *of_segments]

    @property
    def objects(self) -> set[str]:
        """Paths below INDEX of all that belongs to it, but for the record itself."""
        beside = {self.model.json_path, *(segment.json_path for segment in self.segments)}
        return {file.path for file in self.files} | beside


class _Versioned(Record):
    """What the record of any version says."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int


def record_url(index: str) -> str:
    return join(index, RECORD)


def segment_path(name: str) -> str:
    return f"{SEGMENTS}/{name}"


def model_path(name: str) -> str:
    return f"{MODELS}/{name}"


def read_record(index: str, storage: Storage) -> IndexRecord | None:
    """The record of an index; None where there is none.

    Raises:
        UserError: it cannot be read, or is of another schema version.
    """
    url = record_url(index)
    with explained("read", url):
        try:
            data = storage.read(url)
        except FileNotFoundError:
            return None
    version = _Versioned.parse(data, url).schema_version
    if version != INDEX_SCHEMA_VERSION:
        raise UserError(
            f"{redact(url)}: schema version {version}, this program reads "
            f"{INDEX_SCHEMA_VERSION}; give a new INDEX"
        )
    return IndexRecord.parse(data, url)


def read_whole(kind: type[P], index: str, path: str, storage: Storage) -> P | None:
    """A segment or model that a run has finished; None where none has, or a file of it is gone."""
    url = join(index, f"{path}.json")
    try:
        found = kind.parse(storage.read(url), url)
        sizes = [storage.info(join(index, file.path)).size for file in found.files]
    except FileNotFoundError:
        return None
    return found if sizes == [file.bytes for file in found.files] else None


def commit_digest(commit: Commit) -> str:
    """What decides a shard's vectors and keys: its name, fingerprint and the bytes of its parts."""
    objects = [published.sha256 for part in commit.parts for published in part.objects]
    return digest(commit.shard, commit.fingerprint, *objects)


def digest(*words: str) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def caption_of(carried: Sequence[str]) -> str | None:
    """The carried member that is a picture's caption; None where none is."""
    return next((name for name in CAPTIONS if name in carried), None)
