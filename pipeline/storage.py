"""Every byte that comes from or goes to a storage passes through here.

Each request is tried again when the fault can pass, and has a deadline (`retries.py`); on local
paths, mounts included, none: what blocks in the kernel ends by the mount's own timeouts. Objects
appear whole or not at all: object stores put them so, local files are written beside, fsynced and
renamed.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from model.errors import UserError
from pipeline import checksums, s3
from pipeline.checksums import Checksum, DamagedObjectError
from pipeline.faults import CredentialsError as CredentialsError
from pipeline.faults import botocore_errors, no_credentials, words
from pipeline.faults import redact as redact
from pipeline.local_files import (
    BLOCK_BYTES,
    create_local,
    files_below,
    nameless,
    publish_local,
)
from pipeline.retries import SLOWEST_BYTES_PER_SECOND, retried
from pipeline.s3 import ObjectChangedError as ObjectChangedError
from pipeline.s3_listing import list_entries, list_objects, list_side_by_side, read_dates_quickly

T = TypeVar("T")

# s3fs and botocore would try again on their own, and that multiplies: with their defaults a stalled
# request was sent 125 times, for 35 minutes. Here they ask once.
S3_DEFAULTS: dict[str, Any] = {
    "default_block_size": BLOCK_BYTES,
    "config_kwargs": {
        "read_timeout": 10,
        "connect_timeout": 5,
        "max_pool_connections": 32,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        # Some stores send the whole object's checksum along with a range of it.
        "response_checksum_validation": "when_required",
    },
}
S3_TRIES = 1

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")


class StorageError(UserError):
    """A bucket, object or credential that cannot be used as asked."""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes, and what the store calls this version of the object (None if it does not).

    `checksum` of its bytes, where the store tells one that can be checked.
    """

    size: int
    etag: str | None
    checksum: Checksum | None = field(default=None, compare=False)


@contextmanager
def explained(doing: str, url: str) -> Iterator[None]:
    """Turns the faults of a storage into one line that says what, where and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"cannot {doing} {redact(url)}: not found; check the bucket or folder and its spelling"
        ) from error
    except PermissionError as error:
        raise StorageError(
            f"cannot {doing} {redact(url)}: access refused ({words(error)}); check the "
            "credentials (storage_options, or the environment of every node) and their rights"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot {doing} {redact(url)}: {words(error)}") from error


def shared(url: str) -> str:
    """The URL as every process of a job understands it: local paths are absolute.

    Raises:
        StorageError: `memory://`, which lives in one process.
    """
    protocol: str | None
    path: str
    protocol, path = fsspec.core.split_protocol(url)
    if protocol == "memory":
        raise StorageError(f"{url}: memory:// lives in one process, the job's tasks in others")
    if protocol in (None, "file", "local"):
        return os.path.abspath(path)  # noqa: PTH100 pathlib keeps ".."
    return url


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


class Storage:
    """Access to any storage fsspec opens. Small and picklable: tasks carry it along.

    No dataclass: Ray Data looks into those among a stage's settings, and records their fields.

    Args:
        options: passed to fsspec (`storage_options`).
        deadline_seconds: longest time one request may take.
    """

    def __init__(
        self, options: Mapping[str, Any] = MappingProxyType({}), deadline_seconds: float = 60.0
    ) -> None:
        self.options = dict(options)
        self.deadline_seconds = deadline_seconds

    def open(self, url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        protocol = fsspec.core.split_protocol(url)[0]
        if protocol in ("s3", "s3a"):
            config = {**S3_DEFAULTS["config_kwargs"], **self.options.get("config_kwargs", {})}
            options = {**S3_DEFAULTS, **self.options, "config_kwargs": config}
        else:
            options = {} if protocol in (None, "file", "local") else dict(self.options)
        try:
            fs, path = fsspec.core.url_to_fs(url, **options)
            if protocol in ("s3", "s3a"):
                fs.connect()  # only now are its options looked at
        except (ImportError, ValueError, TypeError) as error:
            raise StorageError(f"{redact(url)}: cannot be opened: {words(error)}") from error
        except no_credentials() as error:
            raise CredentialsError(words(error)) from error
        except botocore_errors() as error:  # no such profile, a file that cannot be parsed
            raise StorageError(f"{redact(url)}: cannot be opened: {words(error)}") from error
        if protocol in ("s3", "s3a"):
            fs.retries = S3_TRIES
        return fs, path

    def info(self, url: str) -> FileInfo:
        fs, path = self.open(url)
        if s3.is_s3(fs):
            return self._s3_info(fs, path, url)
        found = self._call(fs, fs.info, path, what="look up", url=url)
        if found["type"] != "file":
            raise FileNotFoundError(f"{redact(url)} is a folder")
        if found.get("size") is None:
            raise StorageError(f"{redact(url)}: the server does not tell its size")
        return FileInfo(int(found["size"]), _etag(fs, found))

    def _s3_info(self, fs: fsspec.AbstractFileSystem, path: str, url: str) -> FileInfo:
        answer = self._call(fs, s3.head, fs, path, what="look up", url=url)
        etag = str(answer.get("ETag", "")).strip('"') or None
        bucket = fs.split_path(path)[0]
        return FileInfo(int(answer["ContentLength"]), etag, checksums.of_answer(answer, bucket))

    def digest(self, url: str, info: FileInfo) -> checksums.Hash | None:
        """An empty digest of the kind of `info.checksum`; None where nothing can be checked."""
        checksum = info.checksum
        if checksum is None or checksum.parts is None:
            return None if checksum is None else checksums.start(checksum)
        fs, path = self.open(url)
        first = self._call(
            fs, s3.part_bytes, fs, path, info.size, checksum.parts, what="look up", url=url
        )
        return None if first is None else checksums.start(checksum, first)

    def parts_are_even(self, url: str, info: FileInfo, part_bytes: int) -> bool:
        """Whether an object that was uploaded in parts has parts of one size, so that its checksum
        says something of its bytes."""
        assert info.checksum is not None
        assert info.checksum.parts is not None
        fs, path = self.open(url)
        parts = info.checksum.parts
        return self._call(
            fs, s3.parts_are_even, fs, path, info.size, part_bytes, parts,
            what="look up", url=url, waits=parts,
        )  # fmt: skip

    def is_folder(self, url: str) -> bool:
        fs, path = self.open(url)
        return bool(self._call(fs, fs.isdir, path, what="look up", url=url))

    def exists(self, url: str) -> bool:
        try:
            self.info(url)
        except FileNotFoundError:
            return False
        return True

    def read(self, url: str, crc32: int | None = None) -> bytes:
        """A whole object, compared with the store's checksum and `crc32`, where they are known."""
        fs, path = self.open(url)
        attempt = s3.Download(fs, path).attempt if s3.is_s3(fs) else partial(fs.cat_file, path)

        def request(**deadline: float) -> bytes:
            data: bytes = attempt(**deadline)
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise DamagedObjectError(f"its crc32 is not {crc32:08x}")
            return data

        return self._call(fs, request, what="read", url=url)

    def read_range(
        self,
        url: str,
        start: int,
        end: int,
        etag: str | None = None,
        unwanted: threading.Event | None = None,
    ) -> bytes:
        """Bytes [start, end) of an object; a short answer counts as a broken connection. Once
        `unwanted` is set, one that breaks is not made again.

        Raises:
            ObjectChangedError: it is not the version `etag` (where the store names versions).
        """
        fs, path = self.open(url)
        what = f"read at offset {start}"
        if s3.is_s3(fs):
            download = s3.Download(fs, path, start, end, etag)
            try:
                return self._call(fs, download.attempt, what=what, url=url, unwanted=unwanted)
            except s3.RangeIgnoredError as error:
                raise _ignores_ranges(url) from error

        def request(**deadline: float) -> bytes:
            data: bytes = fs.cat_file(path, start=start, end=end, **deadline)
            if len(data) > end - start:
                raise _ignores_ranges(url)
            if len(data) < end - start:
                raise ConnectionError(f"{len(data)} of {end - start} bytes at offset {start}")
            return data

        return self._call(fs, request, what=what, url=url, unwanted=unwanted)

    def iter_files(self, folder: str, depth: int | None = None) -> Iterator[str]:
        """Every file below a folder, by its path below it, as the listing goes on; none if it is
        not there. `depth` 1: the folder's own files alone.
        """
        fs, path = self.open(folder)
        root = path.rstrip("/") + "/"
        with suppress(FileNotFoundError):
            if isinstance(fs, LocalFileSystem):
                yield from (name for name, _ in files_below(path, depth))
            elif s3.is_s3(fs):
                objects = self._objects(fs, root, folder, depth=depth)
                yield from (name.removeprefix(root) for name, _ in objects)
            else:
                fs.invalidate_cache()
                names = self._call(
                    fs, fs.find, path, maxdepth=depth, what="list", url=folder, waits=60
                )
                yield from (name.removeprefix(root) for name in names)

    def list_files(self, folder: str) -> dict[str, int]:
        """Every file below a folder: path below it -> size in bytes. Empty if there is none."""
        fs, path = self.open(folder)
        root = path.rstrip("/") + "/"
        sizes: dict[str, int] = {}
        with suppress(FileNotFoundError):
            if isinstance(fs, LocalFileSystem):
                for name, entry in files_below(path):
                    with suppress(FileNotFoundError):  # gone meanwhile
                        sizes[name] = entry.stat().st_size
            elif s3.is_s3(fs):
                for name, size in self._objects(fs, root, folder):
                    sizes[name.removeprefix(root)] = size
            else:
                fs.invalidate_cache()
                found = self._call(
                    fs, fs.find, path, detail=True, what="list", url=folder, waits=60
                )
                sizes = {name.removeprefix(root): int(e["size"]) for name, e in found.items()}
        return sizes

    def list_infos(self, folder: str, first: str, last: str) -> dict[str, FileInfo]:
        """What an S3 listing tells of the files right below a folder whose names lie between two.

        By name; empty if there is none. Checksums are not told.
        """
        fs, path = self.open(folder)
        assert s3.is_s3(fs)
        bucket, prefix, _ = fs.split_path(path.rstrip("/") + "/")
        # Only what is behind a key can be asked for, so from the longest one before the first.
        bounds = [prefix + first[:-1], prefix + last] if first else []
        run = list_side_by_side(bounds, bucket)
        after, until = run[1] if len(run) > 1 else ("", None)
        infos = {}
        with suppress(FileNotFoundError):
            entries = list_entries(
                self._request(fs, folder), bucket, prefix, after=after, until=until
            )
            for entry in entries:
                name = entry["Key"].removeprefix(prefix)
                if "/" not in name:
                    etag = str(entry.get("ETag", "")).strip('"') or None
                    infos[name] = FileInfo(int(entry["Size"]), etag)
        return infos

    def list_names(self, folder: str, bounds: Sequence[str]) -> list[str]:
        """Every file below a folder, in no order. On S3, whose pages come one after the other, the
        runs between some `bounds` (paths below the folder, in order) are listed side by side.
        """
        fs, path = self.open(folder)
        if not s3.is_s3(fs):
            return list(self.iter_files(folder))
        root = path.rstrip("/") + "/"
        bucket, prefix, _ = fs.split_path(root)

        def names(run: tuple[str, str | None]) -> list[str]:
            found = self._objects(fs, root, folder, after=run[0], until=run[1])
            return [name.removeprefix(root) for name, _ in found]

        runs = list_side_by_side([prefix + bound for bound in bounds], bucket)
        with ThreadPoolExecutor(len(runs)) as pool:
            try:
                return [name for found in pool.map(names, runs) for name in found]
            except FileNotFoundError:
                return []

    def glob(self, pattern: str) -> list[str]:
        """URLs of the files that match, sorted."""
        fs, path = self.open(pattern)
        protocol = fsspec.core.split_protocol(pattern)[0]
        front = f"{protocol}://" if protocol else ""
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
        folder = fixed.rpartition("/")[0]
        depth = None if "**" in path else path.count("/") - folder.count("/")
        names: Iterable[str]
        with suppress(FileNotFoundError):
            matches = re.compile(glob_translate(path)).match
            if isinstance(fs, LocalFileSystem):
                names = (f"{folder}/{name}" for name, _ in files_below(folder, depth))
            elif s3.is_s3(fs):
                names = (name for name, _ in self._objects(fs, fixed, pattern, depth=depth))
            else:
                found = self._call(
                    fs, fs.glob, path, detail=True, what="list", url=pattern, waits=60
                )
                return sorted(
                    name if name.startswith(front) else front + name
                    for name, entry in found.items()
                    if entry["type"] == "file"
                )
            return sorted(front + name for name in names if matches(name))
        return []

    def _objects(
        self, fs: fsspec.AbstractFileSystem, start: str, url: str, **which: Any
    ) -> Iterator[tuple[str, int]]:
        """Path (bucket and key) and size of the objects whose path begins with `start`."""
        bucket, prefix, _ = fs.split_path(start)
        if not bucket:
            raise StorageError(f"{redact(url)}: a bucket must be named, without wildcards")
        for key, size in list_objects(self._request(fs, url), bucket, prefix, **which):
            yield f"{bucket}/{key}", size

    def _request(self, fs: fsspec.AbstractFileSystem, url: str) -> Callable[..., dict[str, Any]]:
        """One page of a listing, tried again by itself."""
        read_dates_quickly(fs)

        def request(**options: Any) -> dict[str, Any]:
            page: dict[str, Any] = self._call(
                fs, fs.call_s3, "list_objects_v2", what="list", url=url, **options
            )
            return page

        return request

    def publish_bytes(self, url: str, data: bytes | memoryview) -> None:
        """Puts an object whole, replacing what had its name."""
        fs, path = self.open(url)
        waits = len(data) / SLOWEST_BYTES_PER_SECOND
        if isinstance(fs, LocalFileSystem):
            self._call(fs, publish_local, path, data=data, what="write", url=url)
        elif s3.is_s3(fs):
            self._call(fs, s3.put, fs, path, bytes(data), what="write", url=url, waits=waits)
        else:
            self._call(fs, fs.pipe_file, path, bytes(data), what="write", url=url, waits=waits)
        fs.invalidate_cache()

    def create(self, url: str, data: bytes) -> None:
        """Puts an object where there is none.

        Local files and S3 decide between several who try at once; a store that ignores the
        condition, or cannot express it, replaces what is there.

        Raises:
            FileExistsError: there is one. Where the answer to a first attempt was lost it may
                be the caller's own.
        """
        fs, path = self.open(url)

        def request(path: str, **deadline: float) -> None:
            try:
                fs.pipe_file(path, data, mode="create", **deadline)
            except OSError as error:
                if s3.error_code(error) in ("PreconditionFailed", "412"):
                    raise FileExistsError(f"{redact(url)} is there") from error
                raise

        if isinstance(fs, LocalFileSystem):
            self._call(fs, create_local, path, data, what="create", url=url)
        else:
            self._call(fs, request, path, what="create", url=url)

    def creates_exclusively(self, url: str) -> bool:
        """Whether `create` is more than a look and a write here, as far as the protocol says."""
        return fsspec.core.split_protocol(url)[0] in (None, "file", "local", "s3", "s3a", "gs")

    def nameless(self, url: str) -> IO[bytes]:
        """A file of this machine to be filled and published as `url`; gone with the process."""
        fs, path = self.open(url)
        if isinstance(fs, LocalFileSystem):
            return nameless(Path(path).parent)
        return tempfile.TemporaryFile()

    def publish_file(self, url: str, local: Path) -> None:
        """Moves a finished local file to its final name, whole, and checks what arrived."""
        fs, path = self.open(url)
        size = local.stat().st_size
        if isinstance(fs, LocalFileSystem):
            self._call(fs, publish_local, path, moved=local, what="write", url=url)
        elif s3.is_s3(fs):
            self._put_on_s3(fs, path, local, url)
        else:
            waits = size / SLOWEST_BYTES_PER_SECOND
            self._call(fs, fs.put_file, str(local), path, what="write", url=url, waits=waits)
        fs.invalidate_cache()
        if (arrived := self.info(url).size) != size:
            raise OSError(f"{redact(url)}: {arrived} of {size} bytes arrived")

    def remove_empty(self, folder: str) -> None:
        """Removes a local folder where nothing is in it; stores have no folders."""
        fs, path = self.open(folder)
        if isinstance(fs, LocalFileSystem):
            with suppress(FileNotFoundError):
                if not any(Path(path).iterdir()):
                    Path(path).rmdir()

    def _put_on_s3(self, fs: fsspec.AbstractFileSystem, path: str, local: Path, url: str) -> None:
        def call(function: Callable[..., T], *args: Any, num_bytes: int = 0) -> T:
            waits = num_bytes / SLOWEST_BYTES_PER_SECOND
            return self._call(fs, function, *args, what="write", url=url, waits=waits)

        s3.put_file(fs, path, local, call)

    def remove(self, *urls: str) -> None:
        """Removes objects, or folders with all below them; what is not there is no error."""
        if not urls:
            return
        fs, _ = self.open(urls[0])
        paths = [self.open(url)[1] for url in urls]
        if s3.is_s3(fs):
            with suppress(FileNotFoundError):
                for path in dict.fromkeys(paths):
                    below = self._objects(fs, path.rstrip("/") + "/", urls[0])
                    paths += [name for name, _ in below]
            self._delete(fs, paths, urls[0])
            return
        # Local removal stops at the first path that is gone; stores take them all in few requests.
        runs = [[path] for path in paths] if isinstance(fs, LocalFileSystem) else [paths]
        fs.invalidate_cache()
        for run in runs:
            with suppress(FileNotFoundError):
                self._call(fs, fs.rm, run, recursive=True, what="remove", url=urls[0], waits=600)
        fs.invalidate_cache()

    def remove_objects(self, *urls: str) -> None:
        """Removes these objects and nothing below them; what is not there is no error."""
        if not urls:
            return
        fs, _ = self.open(urls[0])
        paths = [self.open(url)[1] for url in urls]
        if s3.is_s3(fs):
            self._delete(fs, paths, urls[0])
            return
        for path, url in zip(paths, urls, strict=True):
            with suppress(FileNotFoundError):
                self._call(fs, fs.rm_file, path, what="remove", url=url)
        fs.invalidate_cache()

    def _delete(self, fs: fsspec.AbstractFileSystem, paths: Sequence[str], url: str) -> None:
        with suppress(FileNotFoundError):  # no such bucket
            for start in range(0, len(paths), s3.DELETED_AT_ONCE):
                run = paths[start : start + s3.DELETED_AT_ONCE]
                self._call(fs, s3.delete, fs, run, what="remove", url=url, waits=60)
        fs.invalidate_cache()

    def remove_temporaries(self, folder: str) -> None:
        """Removes what workers left that were killed while they wrote a local file.

        Object stores put objects whole: there is nothing to look for.
        """
        if isinstance(self.open(folder)[0], LocalFileSystem):
            files = self.list_files(folder)
            self.remove(*(join(folder, name) for name in files if TEMPORARY.search(name)))

    def _call(
        self, fs: fsspec.AbstractFileSystem, function: Callable[..., T], *args: Any, **how: Any
    ) -> T:
        return retried(fs, self.deadline_seconds, function, *args, **how)


def _ignores_ranges(url: str) -> StorageError:
    return StorageError(
        f"{redact(url)}: the server ignores byte ranges; copy the shard to a storage that honours "
        "them"
    )


def _etag(fs: fsspec.AbstractFileSystem, found: Mapping[str, Any]) -> str | None:
    for name in ("ETag", "etag", "md5Hash"):
        if found.get(name):
            return str(found[name]).strip('"')
    if isinstance(fs, LocalFileSystem):
        return f"mtime-{Path(found['name']).stat().st_mtime_ns}"
    return None
