"""What the store says now of INPUT's shards: size and version of each, from listings on S3.

Local files are looked at one by one, which costs no request; so are objects of other stores, and a
few objects of a large S3 folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.commits import SIDE_BY_SIDE
from pipeline.records import Shard
from pipeline.storage import FileInfo, Storage

WORTH_A_LISTING = 20  # shards of one folder: a page of the listing tells a thousand


def source_infos(shards: Sequence[Shard], storage: Storage) -> dict[str, FileInfo | None]:
    """Size and etag of each shard, by its name; None where there is no such object.

    Raises:
        OSError: the storage failed for good.
    """
    folders: defaultdict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        folders[shard.url.rpartition("/")[0]].append(shard)
    found: dict[str, FileInfo | None] = {}
    for folder, inside in folders.items():
        if folder.startswith(("s3://", "s3a://")) and len(inside) >= WORTH_A_LISTING:
            names = {shard.url.rpartition("/")[2]: shard.name for shard in inside}
            infos = storage.list_infos(folder, min(names), max(names))
            found.update({names[file]: infos[file] for file in names.keys() & infos.keys()})

    def look_up(shard: Shard) -> FileInfo | None:
        try:
            return storage.info(shard.url)
        except FileNotFoundError:
            return None

    rest = [shard for shard in shards if shard.name not in found]  # a listing may be behind
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for shard, info in zip(rest, pool.map(look_up, rest), strict=True):
            found[shard.name] = info
    return found
