"""Reads the source of a committed shard again and compares every sample with what is in OUTPUT."""

from __future__ import annotations

import hashlib

from pipeline.audit_parts import Rejected, Seen
from pipeline.commits import Commit, Dataset
from pipeline.records import Shard
from pipeline.samples import ReadSettings, read_groups
from pipeline.storage import Storage, StorageError, redact


def source_problems(
    commit: Commit, dataset: Dataset, source: Shard, storage: Storage, seen: Seen
) -> list[str]:
    """Reads the source again: every sample of it has the key and the picture of OUTPUT's."""
    try:
        info = storage.info(source.url)
    except FileNotFoundError:
        return [f"the source {redact(source.url)} is not there"]
    except (OSError, StorageError) as error:
        return [f"the source {redact(source.url)} cannot be read: {error}"]
    problems = []
    before = commit.source
    if info.size != before.size:
        problems.append(f"source changed: {before.size} bytes when committed, now {info.size}")
    elif None not in (info.etag, before.etag) and info.etag != before.etag:
        problems.append(f"source changed: {before.etag} when committed, now {info.etag}")
    wrong: dict[int, str] = {}
    settings = ReadSettings(
        storage,
        tuple(dataset.settings["image_key"]),
        tuple(dataset.settings["carry"]),  # what is carried may be too much, and then is a reject
        commit.truncated_at is not None,
    )
    for group in read_groups(source, settings):
        for row in group.samples.to_pylist():
            difference = _difference(row["sample_index"], row["key"], row["data"], seen)
            if difference is not None:
                wrong[row["sample_index"]] = difference
        for row in group.rejects.to_pylist():
            expected = Rejected(row["key"], row["stage"], row["error"])
            if seen.rejects.get(row["sample_index"]) != expected:
                wrong[row["sample_index"]] = f"{row['key']!r} is to be rejected ({row['error']})"
        end = group.head.end
    assert end is not None, "the last group says how the shard ends"
    if end.failure is not None:
        problems.append(f"the source cannot be read: {end.failure}")
    elif end.samples != commit.samples:
        problems.append(f"the source has {end.samples} samples, the commit says {commit.samples}")
    if wrong:
        first = min(wrong)
        problems.append(
            f"{len(wrong)} samples differ from the source's, the first is sample {first}: "
            f"{wrong[first]}"
        )
    return problems


def _difference(index: int, key: str, data: bytes, seen: Seen) -> str | None:
    """How a sample of the source differs from that of OUTPUT, if it does."""
    if index in seen.keys:
        if seen.keys[index] != key:
            return f"key {seen.keys[index]!r}, in the source {key!r}"
        if seen.digests[index] != hashlib.sha256(data).digest():
            return f"{key!r} is another picture in the source"
    elif index in seen.rejects:
        if seen.rejects[index].key != key:
            return f"key {seen.rejects[index].key!r}, in the source {key!r}"
        if seen.rejects[index].stage == "read":
            return f"{key!r} is a reject ({seen.rejects[index].error}), in the source it is whole"
    else:
        return f"{key!r} is missing"
    return None
