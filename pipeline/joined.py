"""Pictures of OUTPUT beside the samples they were made of: both read in order, in lockstep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from model.errors import UserError
from pipeline.commits import Commit
from pipeline.open_shards import OpenShard
from pipeline.printable import printable
from pipeline.read import LOCAL, Output, Picture, open_output, shard_pictures
from pipeline.samples import Sample, read_samples
from pipeline.shards import list_shards
from pipeline.source_pictures import is_another
from pipeline.storage import FileInfo, Storage, explained, redact
from pipeline.tar_stream import BrokenShardError, Member, read_members


@dataclass(frozen=True)
class JoinedSample:
    """A picture and the members of its sample, by their extension."""

    picture: Picture
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Sources:
    """urls: where shards are now, by name, where that is not where their commits say; members: the
    extensions to give; image_key: those of the image, the preferred first."""

    urls: Mapping[str, str]
    members: frozenset[str]
    image_key: tuple[str, ...]


def joined(
    output: str,
    storage: Storage = LOCAL,
    shards: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    members: Sequence[str] | None = None,
    inputs: Sequence[str] = (),
) -> Iterator[JoinedSample]:
    """The pictures of these shards (all committed ones), each with its sample of the source.

    Samples that were rejected are left out. Every image is read, asked for or not, and its sha256
    compared: what comes was embedded so.

    Args:
        members: extensions of the members to give; default: the image's and those carried.
        inputs: INPUT as `extract` takes it, with all these shards, where it has moved since.

    Raises:
        UserError: a shard or a source is not there, or the source cannot be read or has changed
            since it was embedded.
    """
    opened = open_output(output, storage)
    columns = opened.features(features)
    names = opened.shards(shards)
    sources = sources_of(opened, names, members, inputs)
    return (one for name in names for one in joined_shard(opened, name, columns, sources))


def sources_of(
    output: Output, shards: Sequence[str], members: Sequence[str] | None, inputs: Sequence[str]
) -> Sources:
    """Where the samples of these shards are, and what is read of them.

    Raises:
        UserError: INPUT is given, and a shard is not in it.
    """
    settings = output.dataset.settings
    own = [*settings["image_key"], *(name.partition(":")[0] for name in settings["carry"])]
    urls = {s.name: s.url for s in list_shards(inputs, output.storage)} if inputs else {}
    for name in shards if inputs else ():
        if name not in urls:
            where = ", ".join(map(redact, inputs))
            raise UserError(printable(f"shard {name}: {where} has no such shard"))
    asked = frozenset(own if members is None else members)
    return Sources(urls, asked, tuple(settings["image_key"]))


def joined_shard(
    output: Output, name: str, features: Sequence[str], sources: Sources
) -> Iterator[JoinedSample]:
    """One shard's pictures with their samples; none where it is no longer committed."""
    with ExitStack() as held:
        opened = _open_with_source(output, name, sources, held)
        if opened is not None:
            shard, info = opened
            pictures = shard_pictures(shard, output, features)
            yield from _in_lockstep(shard.commit, info, pictures, output.storage, sources)


def _open_with_source(
    output: Output, name: str, sources: Sources, held: ExitStack
) -> tuple[OpenShard, FileInfo] | None:
    """The shard, and its source as its commit says."""
    seen: Commit | None = None
    while True:
        shard = held.enter_context(output.open(name))
        if shard is None:
            return None
        commit = shard.commit
        with explained("read", _url(commit, sources)):
            info = output.storage.info(_url(commit, sources))
        if not is_another(info, commit.source, moved=name in sources.urls):
            return shard, info
        if commit == seen:
            was = f"{commit.source.size} bytes ({commit.source.etag})"
            raise UserError(
                _changed(commit, sources, f"{info.size} bytes ({info.etag}), it had {was}")
            )
        seen = commit  # both may have been replaced between the two looks


def _in_lockstep(
    commit: Commit,
    info: FileInfo,
    pictures: Iterator[Picture],
    storage: Storage,
    sources: Sources,
) -> Iterator[JoinedSample]:
    url = _url(commit, sources)
    wanted = sources.members | set(sources.image_key)
    picture = next(pictures, None)
    with explained("read", url):
        try:
            for sample in read_samples(read_members(url, storage, info), wanted):
                if picture is None or sample.index < picture.sample_index:
                    continue  # a reject
                _check(sample, picture, commit, sources)
                yield JoinedSample(picture, _data(sample, commit, sources))
                picture = next(pictures, None)
        except BrokenShardError as error:
            if not error.cut or commit.truncated_at is None:
                raise UserError(str(error)) from error
    if picture is not None:
        raise UserError(_changed(commit, sources, f"sample {picture.sample_index} is not there"))


def _check(sample: Sample, picture: Picture, commit: Commit, sources: Sources) -> None:
    if (sample.index, sample.key) != (picture.sample_index, picture.key):
        found = f"sample {sample.index} has key {sample.key!r}, not {picture.key!r}"
        raise UserError(_changed(commit, sources, found))
    extension = next((e for e in sources.image_key if e in sample.members), None)
    if extension is None or (
        hashlib.sha256(_bytes(sample.members[extension], commit, sources)).digest()
        != picture.image_sha256
    ):
        found = f"sample {sample.index} ({sample.key!r}) is another picture"
        raise UserError(_changed(commit, sources, found))


def _data(sample: Sample, commit: Commit, sources: Sources) -> dict[str, bytes]:
    return {
        extension: _bytes(member, commit, sources)
        for extension, member in sample.members.items()
        if extension in sources.members
    }


def _bytes(member: Member, commit: Commit, sources: Sources) -> bytes:
    if member.data is None:
        where = f"{_shown(commit, sources)}: {member.name}"
        raise UserError(printable(f"{where}: {member.size} bytes are too many to be read"))
    return member.data


def _url(commit: Commit, sources: Sources) -> str:
    return sources.urls.get(commit.shard, commit.source.url)


def _shown(commit: Commit, sources: Sources) -> str:
    return redact(_url(commit, sources))


def _changed(commit: Commit, sources: Sources, found: str) -> str:
    return printable(
        f"{_shown(commit, sources)}: changed since it was embedded: {found}; bring OUTPUT up to "
        "date with `tessera reindex`"
    )
