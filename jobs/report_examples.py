"""Examples of what was rejected, with a picture of each where its source can still be read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.report_figures import RejectShard
from jobs.thumbnail import thumbnail
from pipeline.commits import Source
from pipeline.records import Reject
from pipeline.samples import read_samples
from pipeline.storage import Storage, StorageError, join
from pipeline.tar_stream import BrokenShardError, read_members

EXAMPLES_OF_A_CODE = 3
MAX_EXAMPLES = 60
MAX_SOURCES = 12  # shards of INPUT that are read, each up to its last example


@dataclass
class Example:
    """`picture` is a JPEG; without one, `note` says why."""

    shard: str
    reject: Reject
    picture: bytes | None = None
    note: str = ""

    @property
    def code(self) -> str:
        return f"{self.reject.stage}/{self.reject.error}"


@dataclass
class Examples:
    """By code, the codes in order; `notes` say what could not be read."""

    by_code: dict[str, list[Example]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def all(self) -> list[Example]:
        return [example for examples in self.by_code.values() for example in examples]


def find_examples(
    code_shards: Mapping[str, Sequence[RejectShard]], output: str, storage: Storage
) -> Examples:
    """A few rejects of each code, from the rejects files of shards that are known to have it."""
    found = Examples({code: [] for code in sorted(code_shards)})
    shards = {shard.name: shard for shards in code_shards.values() for shard in shards}
    for name, shard in sorted(shards.items()):
        try:
            rejects = _read_rejects(join(output, shard.rejects_part.path), storage)
        except (OSError, pa.ArrowException, TypeError) as error:
            found.notes.append(f"{shard.rejects_part.path}: {type(error).__name__}: {error}")
            continue
        for reject in rejects:
            examples = found.by_code.get(f"{reject.stage}/{reject.error}")
            if examples is None or len(examples) >= EXAMPLES_OF_A_CODE:
                continue
            if len(found.all()) < MAX_EXAMPLES:
                examples.append(Example(name, reject))
    return found


def add_pictures(
    examples: Examples,
    code_shards: Mapping[str, Sequence[RejectShard]],
    urls: Mapping[str, str],
    storage: Storage,
) -> None:
    """Reads the sources again, each up to its last example.

    `urls` are those of INPUT, by shard; where one is missing its commit's is taken, which has
    neither password nor query.
    """
    sources = {shard.name: shard.source for shards in code_shards.values() for shard in shards}
    wanted: dict[str, dict[int, Example]] = {}
    for example in examples.all():
        wanted.setdefault(example.shard, {})[example.reject.sample_index] = example
    for number, (name, by_index) in enumerate(sorted(wanted.items())):
        if number < MAX_SOURCES:
            url = urls.get(name, sources[name].url)
            problem = _add_of_source(by_index, url, sources[name], storage)
        else:
            problem = f"not looked for: {MAX_SOURCES} sources are read"
        for example in by_index.values():
            if example.picture is None and not example.note:
                example.note = problem or "cannot be decoded"


def _add_of_source(
    by_index: dict[int, Example], url: str, before: Source, storage: Storage
) -> str | None:
    """Gives why the source could not be read, if it could not."""
    left = set(by_index)
    extensions = frozenset(
        example.reject.member.rpartition("/")[2].partition(".")[2].lower()
        for example in by_index.values()
    )
    try:
        info = storage.info(url)
        if info.size != before.size or (before.etag and info.etag and info.etag != before.etag):
            return "its shard has changed since"
        for sample in read_samples(read_members(url, storage, info), extensions):
            example = by_index.get(sample.index)
            if example is not None:
                left.discard(sample.index)
                _add_picture(example, [member.data for member in sample.members.values()])
            if not left:
                break
    except (OSError, StorageError, BrokenShardError) as error:
        return f"its shard cannot be read: {error}"
    return None


def _add_picture(example: Example, members: Sequence[bytes | None]) -> None:
    data = next((data for data in members if data), None)
    if not example.reject.member or data is None:
        example.note = "no picture is there"
        return
    example.picture = thumbnail(data)


def _read_rejects(url: str, storage: Storage) -> list[Reject]:
    rows = pq.read_table(io.BytesIO(storage.read(url))).to_pylist()
    return [Reject(**row) for row in rows]
