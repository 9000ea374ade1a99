"""What makes output exist: `dataset.json`, one commit for each shard, and the name of every file.

A shard exists for readers if and only if its commit does; the commit is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from model.errors import UserError
from pipeline.printable import printable
from pipeline.records import SCHEMA_VERSION, Shape
from pipeline.storage import TEMPORARY, Storage, explained, join, redact

logger = logging.getLogger(__name__)

DATASET = "dataset.json"
RUNS = "_runs"
COMMITS = "commits"
SIDE_BY_SIDE = 16  # requests for single objects
READ_AHEAD = 1000  # commits in memory at once
R = TypeVar("R", bound="Record")
Format = Literal["parquet", "webdataset", "npy"]


class Record(BaseModel):
    """A JSON document on storage; unknown or missing fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def dump(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def parse(cls: type[R], data: bytes, url: str) -> R:
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise refused(error, url) from error


def refused(error: ValidationError, url: str, *place: str) -> UserError:
    """The first thing that is wrong, without the value: a stranger may have written it."""
    first = error.errors(include_input=False)[0]
    where = ".".join([*place, *map(str, first["loc"])])[:100] or "the document"
    return UserError(printable(f"{redact(url)}: {where}: {first['msg']}"))


class PublishedObject(Record):
    """One object, by its path below OUTPUT."""

    path: str
    bytes: int
    sha256: str


class PartFile(PublishedObject):
    """A run of a shard's rows: an object, and with `npy` those `beside` it that hold the rest."""

    rows: int
    beside: tuple[PublishedObject, ...] = Field((), exclude_if=lambda beside: not beside)

    @property
    def objects(self) -> tuple[PublishedObject, ...]:
        return (self, *self.beside)

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.objects)


class Source(Record):
    """The input shard as it was when it was read."""

    url: str
    size: int
    etag: str | None


class StageSeconds(Record):
    """Seconds of work spent on the shard, summed over its tasks."""

    read: float
    tile: float
    embed: float
    write: float


class Computed(Record):
    """How embeddings were computed; several where replicas of different kinds took part."""

    device: str
    tensor_parallel: int
    attention: str
    batch_tiles: int


class Embedder(Record):
    """A replica that took part, the tiles it computed and the seconds it took for them."""

    node: str
    replica: str
    tiles: int
    seconds: float


class Commit(Record):
    """`samples` in the tar = distinct samples in `parts` + rows in `rejects_part`.

    `reused` of the `tiles` were taken over from the commit before, not computed. `tile_counts`:
    pictures by their number of tiles; `reject_codes`: rejects by `stage/code`. These and `replicas`
    are empty in commits of earlier versions.
    """

    schema_version: int
    fingerprint: str
    shard: str
    source: Source
    samples: int
    tiles: int
    rejects: int
    truncated_at: int | None
    parts: tuple[PartFile, ...]
    rejects_part: PartFile | None
    computed: tuple[Computed, ...]
    seconds: StageSeconds
    committed_at: str
    reused: int = 0
    tile_counts: dict[int, int] = {}
    reject_codes: dict[str, int] = {}
    replicas: tuple[Embedder, ...] = ()


def _time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("expected a time with its zone")
    return text


class NeededSettings(BaseModel):
    """What readers of OUTPUT take from its settings: there, and of the right type."""

    tiling: str
    format: Format = "parquet"
    embedding_dtype: Literal["float16", "float32"]
    image_key: list[str]
    carry: list[str]


class Dataset(Record):
    """What made OUTPUT. `settings` are the options that decide its values and columns."""

    schema_version: int
    fingerprint: str
    tessera_version: str
    model: str
    revision: str | None
    weights_digest: str
    settings: dict[str, Any]
    features: dict[str, Shape]

    @staticmethod
    def describe(
        model: str,
        revision: str | None,
        weights_digest: str,
        settings: dict[str, Any],
        features: dict[str, Shape],
        version: str,
    ) -> Dataset:
        """The fingerprint covers everything that decides a value or a column, not the paths."""
        settings = json.loads(json.dumps(settings))  # as it will be read back: lists, no tuples
        decides = {
            "schema_version": SCHEMA_VERSION,
            "weights_digest": weights_digest,
            "settings": settings,
            "features": features,
        }
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return Dataset(
            schema_version=SCHEMA_VERSION,
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            tessera_version=version,
            model=model,
            revision=revision,
            weights_digest=weights_digest,
            settings=settings,
            features=features,
        )


class Failure(Record):
    """A shard that could not be committed; the next run tries it again."""

    shard: str
    reason: str


Time = Annotated[str, AfterValidator(_time)]


class Progress(Record):
    """How far a run is; kept below `_runs` and gone when a run has ended well.

    `failures` are the first of them, `more_failures` the number of the others: the record is
    written every ten seconds.
    """

    started_at: Time
    updated_at: Time
    ended: bool
    shards: int
    committed: int
    failures: tuple[Failure, ...]
    more_failures: int = 0
    tiles: int
    rejects: int
    tiles_per_second: float


def commit_url(output: str, shard: str) -> str:
    return join(output, COMMITS, f"{shard}.json")


def check_output(output: str, wanted: Dataset, storage: Storage) -> bool:
    """Whether `dataset.json` is there as wanted; where it is not, it may be written.

    Raises:
        UserError: OUTPUT holds something else, or shards made with other settings.
    """
    url = join(output, DATASET)
    with explained("write to", output):
        if storage.exists(url):
            found = Dataset.parse(storage.read(url), url)
            if found.fingerprint == wanted.fingerprint:
                return True
            if any(map(_shard_of, storage.iter_files(join(output, COMMITS)))):
                _refuse_other(output, found, wanted)
            logger.warning("%s: nothing is committed there; its settings change", redact(output))
            return False
        files = storage.iter_files(output)
        foreign = (f for f in files if not TEMPORARY.search(f) and not f.startswith(f"{RUNS}/"))
        if file := next(foreign, None):
            raise UserError(
                f"{redact(output)}: holds files (such as {file}) but no {DATASET}; "
                "give a new or empty OUTPUT"
            )
        return False


def open_output(output: str, wanted: Dataset, storage: Storage) -> None:
    """Makes OUTPUT, or checks that it was made with the same fingerprint.

    Raises:
        UserError: see `check_output`.
    """
    if not check_output(output, wanted, storage):
        with explained("write to", output):
            storage.publish_bytes(join(output, DATASET), wanted.dump())


def read_dataset(output: str, storage: Storage) -> Dataset:
    url = join(output, DATASET)
    with explained("read", url):
        if not storage.exists(url):
            raise UserError(f"{redact(output)}: no {DATASET} there; is it an OUTPUT of `extract`?")
        dataset = Dataset.parse(storage.read(url), url)
    try:
        NeededSettings.model_validate(dataset.settings)
    except ValidationError as error:
        raise refused(error, url, "settings") from error
    return dataset


def _refuse_other(output: str, found: Dataset, wanted: Dataset) -> NoReturn:
    old = {**found.settings, "weights": found.weights_digest[:12], "features": found.features}
    new = {**wanted.settings, "weights": wanted.weights_digest[:12], "features": wanted.features}
    changed = [
        f"{name}: {old.get(name)} there, {new.get(name)} asked"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if found.schema_version != wanted.schema_version:
        changed.append(f"schema {found.schema_version} there, {wanted.schema_version} asked")
    raise UserError(
        f"{redact(output)}: made with other settings ({'; '.join(changed)}); "
        "ask for the same or give another OUTPUT"
    )


def committed_shards(output: str, storage: Storage) -> set[str]:
    """Names of the shards that are committed, by one listing."""
    return set(filter(None, map(_shard_of, storage.iter_files(join(output, COMMITS)))))


def _shard_of(commit: str) -> str | None:
    """The shard of a file below `commits`; None where it is no commit."""
    return commit.removesuffix(".json") if commit.endswith(".json") else None


def read_commits(output: str, shards: Sequence[str], storage: Storage) -> Iterator[Commit]:
    """The commits of these shards, in order, read side by side as they are asked for."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for start in range(0, len(shards), READ_AHEAD):
            run = shards[start : start + READ_AHEAD]
            yield from pool.map(lambda shard: read_commit(output, shard, storage), run)


def read_commit(output: str, shard: str, storage: Storage) -> Commit:
    """The commit of one shard.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is of another shard.
    """
    url = commit_url(output, shard)
    commit = Commit.parse(storage.read(url), url)
    if commit.shard != shard:
        raise UserError(f"{redact(url)}: it is of another shard, {printable(commit.shard)}")
    return commit
