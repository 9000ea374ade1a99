"""From the members of a tar to groups of samples, by WebDataset's key rules.

A group is what one tiling task takes. Its boundaries depend on the shard's content alone: Ray
repeats a broken generator task by skipping as many outputs as it had seen, so a second attempt must
give the same groups in the same order.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.records import (
    Head,
    Reject,
    Row,
    Seconds,
    Shard,
    ShardEnd,
    carried_field,
    from_ipc,
    maybe_from_ipc,
    maybe_to_ipc,
    one_row,
    rejects_table,
    sample_schema,
    to_ipc,
)
from pipeline.storage import Storage, StorageError
from pipeline.tar_headers import shown
from pipeline.tar_stream import MAX_MEMBER_BYTES, BrokenShardError, Member, read_members

logger = logging.getLogger(__name__)

KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
GROUP_SAMPLES = 128
GROUP_BYTES = 32 << 20
MAX_SAMPLE_MEMBERS = 1000  # more are hardly a sample; each is remembered until the key changes
# Every tile of a picture repeats what its sample carries, and a JSON member takes thirty times its
# bytes while it is parsed.
MAX_CARRIED_BYTES = 4 << 20
MAX_SAMPLE_BYTES = MAX_MEMBER_BYTES + MAX_CARRIED_BYTES


@dataclass(frozen=True)
class ReadSettings:
    """image_key: extensions of the image member, the preferred first; carry: members to keep.

    replaced_samples: of a group, at most, where the shard replaces a committed one: the committed
    rows of all its pictures may come to travel with it.
    """

    storage: Storage
    image_key: tuple[str, ...]
    carry: tuple[str, ...] = ()
    accept_truncated: bool = False
    replaced_samples: int | None = None


@dataclass
class Sample:
    """The members of one key, as far as they are needed. `num_bytes` counts the data held."""

    key: str
    index: int
    members: dict[str, Member] = field(default_factory=dict)
    duplicate: str | None = None
    cut: bool = False
    crowded: bool = False
    num_bytes: int = 0

    def add(self, extension: str, member: Member, wanted: bool) -> None:
        """Takes a member in; its data only where they are wanted and may be held."""
        if extension in self.members:
            self.duplicate = member.name
            self.num_bytes -= len(self.members[extension].data or b"")
        elif len(self.members) == MAX_SAMPLE_MEMBERS:
            self.crowded = True
            return
        data = member.data if wanted else None
        if data is not None and self.num_bytes + len(data) > MAX_SAMPLE_BYTES:
            data = None
        self.members[extension] = Member(member.name, member.size, data)
        self.num_bytes += len(data or b"")


@dataclass
class Group:
    """Samples that are tiled by one task, and the samples already rejected among them."""

    number: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_bytes: int = 0

    def is_full(self, most_samples: int) -> bool:
        count = len(self.rows) + len(self.rejects)
        return count >= most_samples or self.num_bytes >= GROUP_BYTES


@dataclass(frozen=True)
class GroupRow:
    """One group on its way from the reading to the tiling task.

    `known` has committed rows of pictures in it (`pipeline.takeover`), where there are any.
    """

    head: Head
    samples: pa.Table
    rejects: pa.Table
    known: pa.Table | None = None

    def dump(self) -> Row:
        return one_row(
            head=self.head.dump(),
            samples=to_ipc(self.samples),
            rejects=to_ipc(self.rejects),
            known=maybe_to_ipc(self.known),
        )

    @staticmethod
    def load(row: Row) -> GroupRow:
        return GroupRow(
            Head.load(row["head"][0]),
            from_ipc(row["samples"][0]),
            from_ipc(row["rejects"][0]),
            maybe_from_ipc(row["known"][0]),
        )


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's key and lower-cased extension of a member; None where it has no key.

    The key is the path up to the first dot of its last component. The rule is that of
    `base_plus_ext` in webdataset/tariterators.py, which cannot be imported without torch.
    """
    found = KEY.match(name)
    return None if found is None else (found[1], found[2].lower())


def read_samples(members: Iterator[Member], wanted: frozenset[str]) -> Iterator[Sample]:
    """Runs of members with the same key; only wanted members keep their data.

    Where the archive breaks, the sample that was being read comes last, marked `cut`, before
    BrokenShardError is raised: what came before it is whole.
    """
    sample: Sample | None = None
    try:
        for member in members:
            named = split_name(member.name)
            if named is None:
                continue
            key, extension = named
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key, 0 if sample is None else sample.index + 1)
            sample.add(extension, member, extension in wanted)
    except BrokenShardError as error:
        named = None if error.member is None else split_name(error.member)
        if named is not None and (sample is None or sample.key != named[0]):
            if sample is not None:
                yield sample
            sample = Sample(named[0], 0 if sample is None else sample.index + 1)
        if sample is not None:
            sample.cut = True
            yield sample
        raise
    if sample is not None:
        yield sample


def read_groups(shard: Shard, settings: ReadSettings) -> Iterator[GroupRow]:
    """Streams one shard as groups; the last one carries the `ShardEnd`.

    Never raises for what is wrong with the shard: a shard that must not be committed ends with a
    `ShardEnd` whose `failure` says why.
    """
    schema = sample_schema(settings.carry)
    wanted = frozenset(settings.image_key) | {name.partition(":")[0] for name in settings.carry}
    most_samples = (settings.replaced_samples if shard.before else None) or GROUP_SAMPLES
    began = time.perf_counter()
    group = Group(0)
    size, etag, count = 0, None, 0
    truncated_at: int | None = None
    failure: str | None = None

    def row(end: ShardEnd | None = None) -> GroupRow:
        seconds = Seconds(read=time.perf_counter() - began)
        return GroupRow(
            Head(
                shard.name,
                shard.url,
                group.number,
                end=end,
                seconds=seconds,
                version=f"{size} {etag}",
            ),
            pa.Table.from_pylist(group.rows, schema),
            rejects_table(group.rejects),
        )

    try:
        info = settings.storage.info(shard.url)
        size, etag = info.size, info.etag
        for sample in read_samples(read_members(shard.url, settings.storage, info), wanted):
            if group.is_full(most_samples):
                yield row()
                began = time.perf_counter()
                group = Group(group.number + 1)
            _add(group, sample, settings)
            count += 1
    except BrokenShardError as error:
        if error.cut and settings.accept_truncated:
            logger.warning("%s; its whole samples are taken (accept_truncated)", error)
            truncated_at = error.offset
        else:
            failure = str(error)
    except (OSError, StorageError) as error:
        failure = f"{type(error).__name__}: {error}"
    except Exception as error:
        # Raised here it would end the whole job, for one shard that nobody has thought of.
        logger.exception("shard %s: unforeseen in reading", shard.name)
        failure = f"unforeseen in reading: {type(error).__name__}: {error}"
    if failure is not None:
        group = Group(group.number)
    yield row(ShardEnd(count, size, etag, truncated_at, failure))


def _add(group: Group, sample: Sample, settings: ReadSettings) -> None:
    extension = next((key for key in settings.image_key if key in sample.members), None)
    image = sample.members[extension] if extension is not None else None
    reason = _unusable(sample, image, settings)
    if reason is not None:
        member = image.name if image is not None else ""
        group.rejects.append(Reject(sample.key, sample.index, member, "read", *reason))
        return
    assert image is not None
    assert image.data is not None
    carried = {name: _carried(name, sample) for name in settings.carry}
    group.rows.append(
        {
            "key": sample.key,
            "sample_index": sample.index,
            "member": image.name,
            "data": image.data,
            **carried,
        }
    )
    group.num_bytes += len(image.data) + sum(len(value or "") for value in carried.values())


def _unusable(
    sample: Sample, image: Member | None, settings: ReadSettings
) -> tuple[str, str] | None:
    """Code and message of the reject that a sample becomes by its members alone, if it does."""
    if sample.cut:
        return "truncated", "the archive is cut in or behind this sample"
    if sample.duplicate is not None:
        return "duplicate-member", f"{shown(sample.duplicate)} stands twice in the sample"
    if sample.crowded:
        return "too-many-members", f"the sample has more than {MAX_SAMPLE_MEMBERS} members"
    if image is None:
        found = shown(", ".join(sorted(sample.members)))
        return "no-image", f"no member of {', '.join(settings.image_key)}; it has {found}"
    if image.data is None:
        return "oversized", f"the image member has {image.size} bytes"
    carried = {name.partition(":")[0] for name in settings.carry}
    others = [m for key, m in sample.members.items() if key in carried and m is not image]
    carried_bytes = sum(member.size for member in others)
    if carried_bytes > MAX_CARRIED_BYTES or any(member.data is None for member in others):
        return "oversized", f"the members to be carried have {carried_bytes} bytes"
    return None


def _carried(name: str, sample: Sample) -> str | bytes | None:
    """The value of a carried member; null where the member or the JSON field is not there."""
    extension, _, path = name.partition(":")
    member = sample.members.get(extension)
    if member is None:
        return None
    assert member.data is not None, "or the sample is `oversized`"
    if path:
        return _json_field(member.data, path)
    if pa.types.is_binary(carried_field(name).type):
        return member.data
    return member.data.decode("utf-8", "replace")


def _json_field(data: bytes, name: str) -> str | None:
    try:
        fields = json.loads(data)
        value = fields.get(name) if isinstance(fields, dict) else None
        text = value if value is None or isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):  # no JSON, or nested deeper than Python reads it
        return None
    # JSON can spell half a surrogate pair ("\ud800"), which no UTF-8 can hold
    return None if text is None else text.encode("utf-8", "replace").decode()
