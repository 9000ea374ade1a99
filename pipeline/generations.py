"""The names of a shard's objects, generation by generation.

A shard that is computed again gets objects of other names than those that its commit holds: nothing
that a reader may be told of is ever overwritten. The first generation of shard `a/b` is
`embeddings/a/b.parquet`, the second `embeddings/a/b.g00002.parquet`; cut in parts,
`embeddings/a/b.g00002-00000.parquet` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.commits import Commit

EMBEDDINGS = "embeddings"
REJECTS = "rejects"
PUBLISHED = (EMBEDDINGS, REJECTS)
SUFFIX = re.compile(r"\.[a-z]+$")
PART_SUFFIX = re.compile(r"-\d{5}$")
GENERATION_SUFFIX = re.compile(r"\.g(\d{5})$")
AMBIGUOUS = re.compile(r"\d{5}$")


class Owner(NamedTuple):
    """A shard and the generation of it that an object may belong to."""

    shard: str
    generation: int


def stem(shard: str, generation: int) -> str:
    return shard if generation == 1 else f"{shard}.g{generation:05d}"


def part_paths(shard: str, generation: int, count: int) -> list[str]:
    """The objects of a shard's rows, below OUTPUT."""
    name = stem(shard, generation)
    names = [name] if count == 1 else [f"{name}-{number:05d}" for number in range(count)]
    return [f"{EMBEDDINGS}/{name}.parquet" for name in names]


def rejects_path(shard: str, generation: int) -> str:
    return f"{REJECTS}/{stem(shard, generation)}.parquet"


def owners(name: str) -> list[Owner]:
    """Whose an object below `embeddings` or `rejects` may be, by its name alone.

    `a.g00002-00000.parquet` may be a part of the second generation of `a`, a part of a shard
    `a.g00002`, or the whole of a shard `a.g00002-00000`; INPUT with two of them is refused.
    """
    whole = SUFFIX.sub("", name)
    found = []
    for shard in dict.fromkeys([whole, PART_SUFFIX.sub("", whole)]):
        found.append(Owner(shard, 1))
        generation = GENERATION_SUFFIX.search(shard)
        if generation and int(generation[1]) > 1:
            found.append(Owner(shard[: generation.start()], int(generation[1])))
    return found


def objects_of(commit: Commit) -> dict[str, int]:
    """The objects that a commit names, below OUTPUT, and the generation of each.

    A name that is not of its shard's is left out: a stranger's commit removes nothing else.
    """
    rejects = [] if commit.rejects_part is None else [commit.rejects_part]
    found = {}
    for part in (*commit.parts, *rejects):
        folder, _, name = part.path.partition("/")
        if folder in PUBLISHED and name.endswith(".parquet"):
            for owner in owners(name):
                if owner.shard == commit.shard:
                    found[part.path] = owner.generation
    return found


def generation_of(commit: Commit) -> int:
    """The highest that a name in the commit tells: the next one's objects are new ones."""
    return max(objects_of(commit).values(), default=1)


def colliding(names: Iterable[str]) -> tuple[str, str] | None:
    """Two shards of which one has a name that objects of the other may come to have."""
    there = set(names)
    for name in sorted(filter(AMBIGUOUS.search, there)):
        for owner in owners(f"{name}.parquet"):
            if owner.shard != name and owner.shard in there:
                return owner.shard, name
    return None
