"""Every byte that comes from or goes to a storage passes through here.

Each request has a deadline and is tried again with growing, jittered pauses when the fault can
pass; what cannot pass (not found, forbidden) is raised at once. Objects appear whole or not at all:
object stores put them so, local files are written beside, fsynced and renamed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from model.errors import UserError
from pipeline.local_files import BLOCK_BYTES, publish_local

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
SLOWEST_BYTES_PER_SECOND = 1 << 20  # a large upload gets this much time beyond the deadline

# Measured on s3fs 2026.9: its defaults try a stalled request 125 times, for 35 minutes.
S3_DEFAULTS: dict[str, Any] = {
    "default_block_size": BLOCK_BYTES,
    "config_kwargs": {
        "read_timeout": 10,
        "connect_timeout": 5,
        "max_pool_connections": 32,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    },
}
S3_RETRIES = 2

PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    NoCredentialsError,
    PartialCredentialsError,
)
TRANSIENT = (OSError, asyncio.TimeoutError, aiohttp.ClientError, BotoCoreError)

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")
QUOTED_URL = re.compile(r"\w+://[^\s'\"]+")


class StorageError(UserError):
    """A bucket, object or credential that cannot be used as asked."""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes, and what the store calls this version of the object (None if it does not)."""

    size: int
    etag: str | None


def redact(url: str) -> str:
    """The URL without user, password and query, fit for logs and records."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", "")) if "@" in parts.netloc else url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def explained(doing: str, url: str) -> Iterator[None]:
    """Turns the faults of a storage into one line that says what, where and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"cannot {doing} {redact(url)}: not found; check the bucket or folder and its spelling"
        ) from error
    except (PermissionError, NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(
            f"cannot {doing} {redact(url)}: access refused ({_words(error)}); check the "
            "credentials (storage_options, or the environment of every node) and their rights"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot {doing} {redact(url)}: {_words(error)}") from error


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


@dataclass(frozen=True)
class Storage:
    """Access to any storage fsspec opens. Small and picklable: tasks carry it along.

    Args:
        options: passed to fsspec (`storage_options`).
        deadline_seconds: longest time one request may take.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    deadline_seconds: float = 60.0

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
            raise StorageError(f"{redact(url)}: cannot be opened: {_words(error)}") from error
        if protocol in ("s3", "s3a"):
            fs.retries = S3_RETRIES
        return fs, path

    def info(self, url: str) -> FileInfo:
        fs, path = self.open(url)
        found = self._call(fs, fs.info, path, what="look up", url=url)
        if found["type"] != "file":
            raise FileNotFoundError(f"{redact(url)} is a folder")
        if found.get("size") is None:
            raise StorageError(f"{redact(url)}: the server does not tell its size")
        return FileInfo(int(found["size"]), _etag(fs, found))

    def is_folder(self, url: str) -> bool:
        fs, path = self.open(url)
        return bool(self._call(fs, fs.isdir, path, what="look up", url=url))

    def exists(self, url: str) -> bool:
        try:
            self.info(url)
        except FileNotFoundError:
            return False
        return True

    def read(self, url: str) -> bytes:
        fs, path = self.open(url)
        data: bytes = self._call(fs, fs.cat_file, path, what="read", url=url)
        return data

    def read_range(self, url: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object; a short answer counts as a broken connection."""
        fs, path = self.open(url)

        def request(path: str, **deadline: float) -> bytes:
            data: bytes = fs.cat_file(path, start=start, end=end, **deadline)
            if len(data) > end - start:
                raise StorageError(
                    f"{redact(url)}: the server ignores byte ranges; copy the shard to a storage "
                    "that honours them"
                )
            if len(data) < end - start:
                raise ConnectionError(f"{len(data)} of {end - start} bytes at offset {start}")
            return data

        return self._call(fs, request, path, what=f"read at offset {start}", url=url)

    def list_files(self, folder: str) -> dict[str, int]:
        """Every file below a folder: path below it -> size in bytes. Empty if there is none."""
        fs, path = self.open(folder)
        fs.invalidate_cache()
        try:
            found = self._call(fs, fs.find, path, detail=True, what="list", url=folder, waits=60)
        except FileNotFoundError:
            return {}
        root = path.rstrip("/") + "/"
        return {name.removeprefix(root): int(entry["size"]) for name, entry in found.items()}

    def glob(self, pattern: str) -> list[str]:
        """URLs of the files that match, sorted."""
        fs, path = self.open(pattern)
        found = self._call(fs, fs.glob, path, detail=True, what="list", url=pattern, waits=60)
        protocol = fsspec.core.split_protocol(pattern)[0]
        front = f"{protocol}://" if protocol else ""
        names = [name for name, entry in found.items() if entry["type"] == "file"]
        return sorted(name if name.startswith(front) else front + name for name in names)

    def publish_bytes(self, url: str, data: bytes) -> None:
        """Puts an object whole, replacing what had its name."""
        fs, path = self.open(url)
        if isinstance(fs, LocalFileSystem):
            self._call(fs, publish_local, path, data=data, what="write", url=url)
        else:
            waits = len(data) / SLOWEST_BYTES_PER_SECOND
            self._call(fs, fs.pipe_file, path, data, what="write", url=url, waits=waits)

    def publish_file(self, url: str, local: Path) -> None:
        """Moves a finished local file to its final name, whole, and checks what arrived."""
        fs, path = self.open(url)
        size = local.stat().st_size
        if isinstance(fs, LocalFileSystem):
            self._call(fs, publish_local, path, moved=local, what="write", url=url)
        else:
            waits = size / SLOWEST_BYTES_PER_SECOND
            self._call(fs, fs.put_file, str(local), path, what="write", url=url, waits=waits)
        fs.invalidate_cache()
        if (arrived := self.info(url).size) != size:
            raise OSError(f"{redact(url)}: {arrived} of {size} bytes arrived")

    def remove(self, *urls: str) -> None:
        """Removes objects, or folders with all below them; what is not there is no error."""
        if not urls:
            return
        fs, _ = self.open(urls[0])
        paths = [self.open(url)[1] for url in urls]
        # Local removal stops at the first path that is gone; stores take them all in few requests.
        runs = [[path] for path in paths] if isinstance(fs, LocalFileSystem) else [paths]
        fs.invalidate_cache()
        for run in runs:
            with suppress(FileNotFoundError):
                self._call(fs, fs.rm, run, recursive=True, what="remove", url=urls[0], waits=600)
        fs.invalidate_cache()

    def remove_temporaries(self, folder: str) -> None:
        """Removes what workers left that were killed while they wrote a local file.

        Object stores put objects whole: there is nothing to look for.
        """
        if isinstance(self.open(folder)[0], LocalFileSystem):
            files = self.list_files(folder)
            self.remove(*(join(folder, name) for name in files if TEMPORARY.search(name)))

    def _call(
        self,
        fs: fsspec.AbstractFileSystem,
        function: Callable[..., T],
        *args: Any,
        what: str,
        url: str,
        waits: float = 0.0,
        **kwargs: Any,
    ) -> T:
        if isinstance(fs, AsyncFileSystem):
            kwargs["timeout"] = self.deadline_seconds + waits
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function(*args, **kwargs)
            except (*PERMANENT, *TRANSIENT) as error:
                fault = _true_fault(error)
                _raise_if_permanent(fault, url)
                reason = _words(fault)
                if attempt == ATTEMPTS or _out_of_space(fault):
                    raise OSError(
                        f"cannot {what} {redact(url)}: {reason} ({attempt} attempts)"
                    ) from error
                pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311 jitter
                logger.warning(
                    "%s %s: %s; attempt %d of %d, next in %.1f s",
                    what, redact(url), reason, attempt, ATTEMPTS, pause,
                )  # fmt: skip
                time.sleep(pause)
            except UserError:
                raise
            except Exception as error:  # a storage's own kind of error: told, never tried again
                raise OSError(f"cannot {what} {redact(url)}: {_words(error)}") from error
        raise AssertionError("unreachable")


def _true_fault(error: BaseException) -> BaseException:
    """fsspec's http says "not found" for whatever it met while it asked for a size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, TRANSIENT):
        return cause
    return error


def _raise_if_permanent(fault: BaseException, url: str) -> None:
    """Raises what trying again cannot mend, in words without the secret parts of the URL."""
    status = fault.status if isinstance(fault, aiohttp.ClientResponseError) else None
    if isinstance(fault, FileNotFoundError) or status in (404, 410):
        raise FileNotFoundError(f"{redact(url)} is not there") from fault
    if status in (401, 403):
        raise PermissionError(f"status {status}") from fault
    if isinstance(fault, PERMANENT):
        raise fault


def _words(error: BaseException) -> str:
    """What an error says, on one line; the URLs that http's errors quote lose their signatures."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if text in ("", "None"):  # s3fs' errors for answers without a body
        return name
    text = QUOTED_URL.sub(lambda quoted: redact(quoted[0]), text)
    return text if type(error) in (OSError, PermissionError) else f"{name}: {text}"


def _out_of_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (28, 122)  # ENOSPC, EDQUOT


def _etag(fs: fsspec.AbstractFileSystem, found: Mapping[str, Any]) -> str | None:
    for name in ("ETag", "etag", "md5Hash"):
        if found.get(name):
            return str(found[name]).strip('"')
    if isinstance(fs, LocalFileSystem):
        return f"mtime-{Path(found['name']).stat().st_mtime_ns}"
    return None
