"""The names of a shard's objects, format by format and generation by generation.

A shard that is computed again gets objects of other names than those that its commit holds: nothing
that a reader may be told of is ever overwritten. The first generation of shard `a/b` is
`embeddings/a/b.parquet` (webdataset: `.tar`), the second `embeddings/a/b.g00002.parquet`; cut in
parts, `embeddings/a/b.g00002-00000.parquet` and so on.

With npy every part is one array a feature and a table beside them, in folders that autofaiss and
clip-retrieval list each on its own, sort by name and pair by position: `embeddings/img_emb/
img_emb_a~2Fb.npy` (a folder for each feature, named so, where there are several) and
`embeddings/metadata/metadata_a~2Fb.parquet`. clip-retrieval looks into no folder below, hence the
escaped slash. The dot is escaped for the order: `a` and `a.o` would change places between `.npy`
and `.parquet`; the suffix of a generation, `.g`, sorts before both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline.commits import Commit, Format
from pipeline.layout import Layout

EMBEDDINGS = "embeddings"
REJECTS = "rejects"
PUBLISHED = (EMBEDDINGS, REJECTS)
ARRAYS, METADATA = "img_emb", "metadata"  # clip-retrieval's clip_index.py and clip_back.py
SUFFIX = re.compile(r"\.[a-z]+$")
PART_SUFFIX = re.compile(r"-\d{5}$")
GENERATION_SUFFIX = re.compile(r"\.g(\d{5})$")
AMBIGUOUS = re.compile(r"\d{5}$")
SUFFIXES = (".parquet", ".tar", ".npy")
NPY_OBJECT = re.compile(rf"[^/]+/(?:{ARRAYS}_(?=.*\.npy$)|{METADATA}_(?=.*\.parquet$))([^/]*)$")


class Owner(NamedTuple):
    """A shard and the generation of it that an object may belong to, as one of several or whole."""

    shard: str
    generation: int
    is_cut: bool = False


def stem(shard: str, generation: int) -> str:
    return shard if generation == 1 else f"{shard}.g{generation:05d}"


def part_paths(shard: str, generation: int, count: int, layout: Layout) -> list[list[str]]:
    """The objects of each part of a shard's rows, below OUTPUT; the first is the part's own, the
    others lie beside it."""
    name = shard if layout.format != "npy" else _escaped(shard)
    name = stem(name, generation)
    names = [name] if count == 1 else [f"{name}-{number:05d}" for number in range(count)]
    if layout.format != "npy":
        suffix = ".tar" if layout.format == "webdataset" else ".parquet"
        return [[f"{EMBEDDINGS}/{name}{suffix}"] for name in names]
    features = list(layout.features)
    folders = [ARRAYS] if len(features) == 1 else features
    return [
        [
            *(f"{EMBEDDINGS}/{folder}/{ARRAYS}_{name}.npy" for folder in folders),
            f"{EMBEDDINGS}/{METADATA}/{METADATA}_{name}.parquet",
        ]
        for name in names
    ]


def rejects_path(shard: str, generation: int) -> str:
    return f"{REJECTS}/{stem(shard, generation)}.parquet"


def _escaped(shard: str) -> str:
    return re.sub("[~./]", lambda found: f"~{ord(found[0]):02X}", shard)


def _unescaped(name: str) -> str:
    return re.sub("~(7E|2E|2F)", lambda found: chr(int(found[1], 16)), name)


def owners(path: str, layout_format: Format) -> list[Owner]:
    """Whose an object below OUTPUT may be, by its name alone; none where it cannot be one.

    `a.g00002-00000.parquet` may be a part of the second generation of `a`, a part of a shard
    `a.g00002`, or the whole of a shard `a.g00002-00000`; INPUT with two of them is refused.
    """
    folder, _, name = path.partition("/")
    if folder not in PUBLISHED:
        return []
    if layout_format == "npy" and folder == EMBEDDINGS:
        found = NPY_OBJECT.match(name)
        if found is None:
            return []
        named = _owners_of_stem(SUFFIX.sub("", found[1]))
        return [owner._replace(shard=_unescaped(owner.shard)) for owner in named]
    return _owners_of_stem(SUFFIX.sub("", name))


def _owners_of_stem(whole: str) -> list[Owner]:
    found = []
    for shard in dict.fromkeys([whole, PART_SUFFIX.sub("", whole)]):
        is_cut = shard != whole
        found.append(Owner(shard, 1, is_cut))
        generation = GENERATION_SUFFIX.search(shard)
        if generation and int(generation[1]) > 1:
            found.append(Owner(shard[: generation.start()], int(generation[1]), is_cut))
    return found


def objects_of(commit: Commit) -> dict[str, int]:
    """The objects that a commit names, below OUTPUT, and the generation of each.

    A name that is not of its shard's is left out: a stranger's commit removes nothing else.
    """
    rejects = [] if commit.rejects_part is None else [commit.rejects_part]
    found = {}
    layout_format = _format_of(commit)
    for part in (*commit.parts, *rejects):
        for path in (published.path for published in part.objects):
            for owner in owners(path, layout_format) if path.endswith(SUFFIXES) else ():
                if owner.shard == commit.shard:
                    found[path] = owner.generation
    return found


def _format_of(commit: Commit) -> Format:
    """By the names of its objects: a commit does not tell."""
    return "npy" if any(part.path.endswith(".npy") for part in commit.parts) else "parquet"


def generation_of(commit: Commit) -> int:
    """The highest that a name in the commit tells: the next one's objects are new ones."""
    return max(objects_of(commit).values(), default=1)


def colliding(names: Iterable[str]) -> tuple[str, str] | None:
    """Two shards of which one has a name that objects of the other may come to have, or lies in a
    folder of that name."""
    there = set(names)
    for name in sorted(there):
        for folder in map(str, PurePosixPath(name).parents):
            if folder.endswith((".json", *SUFFIXES)):
                for owner in _owners_of_stem(SUFFIX.sub("", folder)):
                    if owner.shard in there:
                        return owner.shard, name
    for name in sorted(filter(AMBIGUOUS.search, there)):
        for owner in _owners_of_stem(name):
            if owner.shard != name and owner.shard in there:
                return owner.shard, name
    return None
