"""Which shards there are: INPUT as users write it, turned into URLs and shard names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import braceexpand

from model.errors import UserError
from pipeline.generations import colliding
from pipeline.printable import printable
from pipeline.records import Shard
from pipeline.storage import Storage, StorageError, explained, redact, shared

WILDCARD = re.compile(r"[*?\[{]")


def list_shards(inputs: Sequence[str], storage: Storage) -> list[Shard]:
    """Lists the shards of INPUT in order of their names.

    Args:
        inputs: paths or URLs of shards, brace ranges, globs, folders, or `@list.txt`.

    Raises:
        UserError: nothing was found, a storage refused, or two shards would share a name.
    """
    if len(inputs) == 1 and not inputs[0].startswith("@"):
        urls, folder = _expand(inputs[0], storage)
    else:
        urls = [
            url for entry in inputs for line in _lines(entry) for url in _expand(line, storage)[0]
        ]
        folder = _common_folder(urls)
    if not urls:
        raise UserError(f"no shards in {', '.join(map(redact, inputs))}: expected *.tar")
    shards = sorted((Shard(url, _name(url, folder)) for url in urls), key=lambda s: s.name)
    _refuse_collisions(shards)
    return shards


def probe_shards(shards: Sequence[Shard], storage: Storage) -> None:
    """Looks up three of the shards, so that a wrong bucket or key stops a job before it starts.

    Raises:
        StorageError: access was refused, or none of the three exists.
    """
    chosen = sorted({0, len(shards) // 2, len(shards) - 1})
    missing: FileNotFoundError | None = None
    for index in chosen:
        try:
            with explained("read", shards[index].url):
                storage.info(shards[index].url)
            return
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            missing = error.__cause__
    names = ", ".join(redact(shards[index].url) for index in chosen)
    raise StorageError(
        f"none of the shards was found (tried {names}); check INPUT's bucket or folder"
    ) from missing


def _lines(entry: str) -> list[str]:
    return read_list(entry) if entry.startswith("@") else [entry]


def read_list(entry: str) -> list[str]:
    """The shards of `@list.txt`, one a line; `#` begins a comment.

    Raises:
        UserError: it cannot be read, or is no text in UTF-8.
    """
    try:
        text = Path(entry[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{entry}: cannot read the list of shards: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{entry}: cannot read the list of shards: byte {error.start} is not UTF-8"
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _expand(pattern: str, storage: Storage) -> tuple[list[str], str]:
    """URLs of one INPUT entry, and the folder that its shards' names are relative to."""
    pattern = shared(pattern)
    if wildcard := WILDCARD.search(_address(pattern)):
        folder = pattern[: wildcard.start()].rpartition("/")[0]
        urls: list[str] = []
        for expanded in _braces(pattern):
            if WILDCARD.search(_address(expanded)):
                with explained("list", expanded):
                    urls += storage.glob(expanded)
            else:
                urls.append(expanded)
        return urls, folder
    if _address(pattern).endswith(".tar"):
        return [pattern], _address(pattern).rpartition("/")[0]
    with explained("list", pattern):
        found = [name for name in storage.iter_files(pattern) if name.endswith(".tar")]
        # Asked last: on S3 the answer takes a listing of the whole folder, kept in memory.
        if not found and not storage.is_folder(pattern):
            raise FileNotFoundError(pattern)
    folder = pattern.rstrip("/")
    return [f"{folder}/{name}" for name in found], folder


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern, escape=False)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise UserError(f"{redact(pattern)}: not a brace range: a brace stays open") from error


def _address(url: str) -> str:
    """The URL without an http query, whose characters are no part of the path."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _common_folder(urls: Sequence[str]) -> str:
    if not urls:
        return ""
    folders = [_address(url).split("/")[:-1] for url in urls]
    shortest = min(map(len, folders))
    common = 0
    while common < shortest and len({tuple(f[: common + 1]) for f in folders}) == 1:
        common += 1
    return "/".join(folders[0][:common])


def _name(url: str, folder: str) -> str:
    below = _address(url)[len(folder) :].lstrip("/")
    name = below.removesuffix(".tar")
    if {"", ".", ".."} & {*below.split("/"), *name.split("/")}:  # a disk would call it otherwise
        raise UserError(
            f"{redact(url)}: a shard's path may not hold '.', '..' or empty names below its folder"
        )
    if printable(name) != name:  # it becomes a file's name, and stands in logs
        raise UserError(f"{redact(url)}: a shard's name may not hold control characters; rename it")
    return name


def _refuse_collisions(shards: Sequence[Shard]) -> None:
    counts = Counter(shard.name for shard in shards)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"shard {name}.tar is listed {count} times; list it once")
    refuse_colliding(counts)


def refuse_colliding(names: Iterable[str]) -> None:
    """Raises a UserError where objects of two shards could come to have the same name."""
    if found := colliding(names):
        raise UserError(
            f"shard names {found[0]} and {found[1]} collide with the names of cut output parts; "
            "give one of them its own OUTPUT"
        )
