"""Pictures of committed shards, as they stand in the tars that the shards were made from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.commits import Source
from pipeline.samples import read_samples
from pipeline.storage import FileInfo, Storage, StorageError
from pipeline.tar_stream import BrokenShardError, read_members

MAX_CACHED_BYTES = 128 << 20
ENTRY_BYTES = 500  # what an entry of the cache takes besides
NUM_LOCKS = 16


Place = tuple[str, Source, int]  # shard, as its commit says, sample_index


class SourceGoneError(Exception):
    """The source does not have the picture any more, or cannot be read; one line says which."""


@dataclass(frozen=True)
class Pictured:
    """A sample's key and its encoded picture, None where it has none."""

    key: str
    data: bytes | None


class SourcePictures:
    """Reads a tar as far as the picture that is asked for, and keeps the last of what it passed.

    Threads may ask at the same time; a shard is read by one of them. Memory: MAX_CACHED_BYTES, and
    a sample for each thread.

    Args:
        image_key: extensions of the image member, in order of preference, as OUTPUT was made.
        urls: where shards are, if not where their commits say.
    """

    def __init__(self, image_key: Sequence[str], storage: Storage, urls: Mapping[str, str]) -> None:
        self._image_key = tuple(image_key)
        self._storage = storage
        self._urls = urls
        self._cached: OrderedDict[Place, Pictured] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in range(NUM_LOCKS)]

    def picture(self, shard: str, source: Source, sample_index: int, key: str) -> bytes:
        """The encoded picture of a sample of a committed shard, whose commit gives the source.

        The source is known by size and etag, one that has moved by its size alone, and the sample
        by its key: neither commit nor index has a picture's sha256 (`embeddings` do).

        Raises:
            SourceGoneError: it is not there as it was.
        """
        with self._shard_locks[hash(shard) % NUM_LOCKS]:
            found = self._of_cache((shard, source, sample_index))
            if found is None:
                found = self._of_tar(shard, source, sample_index)
        if found is None or found.key != key or found.data is None:
            raise SourceGoneError("its shard has no such picture")
        return found.data

    def _of_tar(self, shard: str, source: Source, sample_index: int) -> Pictured | None:
        url = self._urls.get(shard, source.url)
        try:
            info = self._storage.info(url)
            if is_another(info, source, moved=shard in self._urls):
                raise SourceGoneError("its shard has changed since it was embedded")
            members = read_members(url, self._storage, info)
            for sample in read_samples(members, frozenset(self._image_key)):
                images = (sample.members[k].data for k in self._image_key if k in sample.members)
                found = Pictured(sample.key, next(images, None))
                self._keep((shard, source, sample.index), found)
                if sample.index == sample_index:
                    return found
        except FileNotFoundError as error:
            raise SourceGoneError("its shard is not there any more") from error
        except (OSError, StorageError, BrokenShardError) as error:
            raise SourceGoneError(f"its shard cannot be read: {error}") from error
        return None

    def _of_cache(self, place: Place) -> Pictured | None:
        with self._lock:
            found = self._cached.get(place)
            if found is not None:
                self._cached.move_to_end(place)
            return found

    def _keep(self, place: Place, pictured: Pictured) -> None:
        with self._lock:
            before = self._cached.pop(place, None)
            self._cached[place] = pictured
            self._cached_bytes += _size(pictured) - (0 if before is None else _size(before))
            while self._cached_bytes > MAX_CACHED_BYTES:
                _, oldest = self._cached.popitem(last=False)
                self._cached_bytes -= _size(oldest)


def _size(pictured: Pictured) -> int:
    return ENTRY_BYTES + len(pictured.key) + len(pictured.data or b"")


def is_another(info: FileInfo, source: Source, moved: bool) -> bool:
    """Whether an object is not the version that was read, as far as size and etag tell.

    A copy elsewhere (`moved`) has an etag of its own (of a local file, its time of modification).
    """
    etags = set() if moved else {info.etag, source.etag} - {None}
    return info.size != source.size or len(etags) > 1
