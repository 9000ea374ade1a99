"""The commit that a shard's next one replaces: named by a short mark, read by the tasks themselves.

A run over shards that have all changed would else hold every old commit in its driver's memory.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from model.errors import UserError
from pipeline.commits import Commit, read_commit
from pipeline.generations import generation_of, objects_of, owners, part_paths, rejects_path
from pipeline.layout import Layout
from pipeline.storage import Storage, join

MARK_BYTES = 16


class ReplacedMeanwhileError(UserError):
    """The commit is not the one that was compared with INPUT."""


def replaced_meanwhile(shard: str) -> ReplacedMeanwhileError:
    return ReplacedMeanwhileError(
        f"shard {shard}: its commit is not the one that was compared with INPUT; run it again"
    )


def mark_of(commit: Commit) -> str:
    """What tells this commit from any other of its shard: 32 characters."""
    data = commit.model_dump_json().encode()
    return hashlib.blake2b(data, digest_size=MARK_BYTES).hexdigest()


def read_replaced(shard: str, mark: str, output: str, storage: Storage) -> Commit:
    """The commit of a shard, as it was when it got its mark.

    Raises:
        ReplacedMeanwhileError: it is another one by now.
        OSError: it is gone, or the storage failed.
    """
    commit = read_commit(output, shard, storage)
    if mark_of(commit) != mark:
        raise replaced_meanwhile(shard)
    return commit


def remove_older(commit: Commit, layout: Layout, output: str, storage: Storage) -> None:
    """Removes the objects of the shard's earlier generations, by their names: what a task does that
    committed, and died before it had removed what it replaced."""
    named = objects_of(commit)
    (objects,) = part_paths(commit.shard, 1, 1, layout)
    places = {str(PurePosixPath(p).parent) for p in (*objects, rejects_path(commit.shard, 1))}
    for place in sorted(places):
        paths = [f"{place}/{name}" for name in storage.iter_files(join(output, place), depth=1)]
        older = [path for path in paths if path not in named and _is_older(path, commit, layout)]
        storage.remove_objects(*(join(output, path) for path in older))


def _is_older(path: str, commit: Commit, layout: Layout) -> bool:
    newest = generation_of(commit)
    found = owners(path, layout.format)
    return any(owner.shard == commit.shard and owner.generation < newest for owner in found)
