"""How large shards are: from listings where the storage lists, else asked for one by one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec

from pipeline.records import Shard
from pipeline.storage import Storage, explained, join

LISTED = (None, "file", "local", "s3", "s3a")  # protocols whose listings tell sizes cheaply
MOST_FOLDERS = 16  # more are listed from the folder that is common to them
SIDE_BY_SIDE = 16


def shard_sizes(shards: Sequence[Shard], storage: Storage) -> list[int | None]:
    """Bytes of each shard, None where it is not there.

    Raises:
        StorageError: the storage refuses.
    """
    if any(fsspec.core.split_protocol(shard.url)[0] not in LISTED for shard in shards):
        return _asked_for(shards, storage)
    found: dict[str, int] = {}
    for folder in _folders([shard.url for shard in shards]):
        with explained("list", folder):
            listed = storage.list_files(folder)
        found |= {join(folder, name): size for name, size in listed.items()}
    return [found.get(shard.url) for shard in shards]


def _folders(urls: Sequence[str]) -> list[str]:
    """Few folders that hold all of them, none below another."""
    parents = sorted({url.rpartition("/")[0] for url in urls})
    if len(parents) > MOST_FOLDERS:
        first, last = parents[0].split("/"), parents[-1].split("/")
        common = 0
        while common < min(len(first), len(last)) and first[common] == last[common]:
            common += 1
        # a bucket is the least that can be listed
        if common > (3 if "://" in parents[0] else 0):
            return ["/".join(first[:common])]
    return [
        parent for parent in parents if not any(parent.startswith(f"{other}/") for other in parents)
    ]


def _asked_for(shards: Sequence[Shard], storage: Storage) -> list[int | None]:
    def size(shard: Shard) -> int | None:
        with explained("look up", shard.url):
            try:
                return storage.info(shard.url).size
            except FileNotFoundError:
                return None

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(size, shards))
