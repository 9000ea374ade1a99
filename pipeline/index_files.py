"""The files of an index: published from a local folder, and read through a local file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import faiss
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from model.errors import UserError
from pipeline.index_record import IndexFile
from pipeline.part_copies import copy_hashed
from pipeline.storage import Storage, explained, join, redact

REPAIR = "remove it and run `tessera index` again"
DIFFERS = f"its bytes are not those of the record (sha256 differs); {REPAIR}"


def publish_table(index: str, path: str, table: pa.Table, storage: Storage) -> IndexFile:
    """Puts a Parquet file at its place in INDEX.

    Raises:
        UserError: the temporary folder is full.
        OSError: the storage failed.
    """
    return _publish(
        index, path, lambda file: pq.write_table(table, file, compression="zstd"), storage
    )


def publish_faiss(index: str, path: str, vectors: faiss.Index, storage: Storage) -> IndexFile:
    """The same of a FAISS file."""
    # FAISS prints what goes wrong when it closes a file, and goes on.
    return _publish(
        index,
        path,
        lambda file: faiss.write_index(vectors, faiss.PyCallbackIOWriter(file.write)),
        storage,
    )


def _publish(
    index: str, path: str, write: Callable[[IO[bytes]], object], storage: Storage
) -> IndexFile:
    """By way of a nameless file: a killed process leaves nothing on its machine."""
    with tempfile.TemporaryFile() as file:
        try:
            with os.fdopen(os.dup(file.fileno()), "wb") as sink:
                write(sink)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot hold {path.rpartition('/')[2]} "
                f"({error.strerror or error}); make room, or set TMPDIR to a larger folder"
            ) from error
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        storage.publish_file(join(index, path), Path(f"/dev/fd/{file.fileno()}"))
        return IndexFile(path=path, bytes=file.tell(), sha256=sha256)


def read_table(index: str, file: IndexFile, storage: Storage) -> pa.Table:
    """A Parquet file of INDEX.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is not what the record says.
    """
    with local_file(index, file, storage) as path:
        try:
            # `pq.read_table` goes by way of pyarrow's datasets, which load pandas.
            with pq.ParquetFile(path) as parquet:
                return parquet.read(use_threads=False)
        except pa.ArrowException as error:
            raise UserError(_unreadable(index, file, error)) from error


def read_faiss(index: str, file: IndexFile, storage: Storage, mapped: bool = True) -> faiss.Index:
    """A FAISS file of INDEX. Mapped: what is not looked at is not read.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is not what the record says.
    """
    with local_file(index, file, storage) as path:
        try:
            return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise UserError(_unreadable(index, file, error)) from error


def _unreadable(index: str, file: IndexFile, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{redact(join(index, file.path))}: cannot be read ({reason}); {REPAIR}"


@contextmanager
def local_file(index: str, file: IndexFile, storage: Storage) -> Iterator[str]:
    """The path of a file of INDEX on this machine; once it is open it may go away.

    A file of another store is copied to a nameless one, and its bytes compared with the record.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is not what the record says.
    """
    url = join(index, file.path)
    fs, path = storage.open(url)
    if isinstance(fs, LocalFileSystem):
        found = Path(path).stat().st_size
        if found != file.bytes:
            raise UserError(f"{url}: {found} bytes, the record says {file.bytes}; {REPAIR}")
        yield path
        return
    with tempfile.TemporaryFile() as copy:
        copy_file(index, file, storage, copy)
        yield f"/dev/fd/{copy.fileno()}"


def copy_file(index: str, file: IndexFile, storage: Storage, sink: IO[bytes]) -> None:
    """Copies a file of INDEX, block by block, and compares its bytes with the record.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is not what the record says, or the storage refuses.
    """
    url = join(index, file.path)
    with _explained_but_missing(url):
        sha256 = copy_hashed(url, file.bytes, storage, sink)
    if sha256 != file.sha256:
        raise UserError(f"{redact(url)}: {DIFFERS}")


@contextmanager
def _explained_but_missing(url: str) -> Iterator[None]:
    """Storage faults as one line; that a file is not there is for the caller to judge."""
    missing: FileNotFoundError | None = None
    with explained("read", url):
        try:
            yield
        except FileNotFoundError as error:
            missing = error
    if missing is not None:
        raise missing
