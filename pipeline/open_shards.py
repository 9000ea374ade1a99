"""A committed shard held open: what is read of it is of one commit, whole, whatever happens to it.

A shard that is computed again gets objects of new names, and the old ones vanish after its new
commit is put. So every part is held before the first row is given out: a local file stays readable
while it is open, of another store's object there is a copy in a nameless file, compared with the
commit's sha256.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from model.errors import UserError
from pipeline.commits import DATASET, Commit, PublishedObject, commit_url, read_commit
from pipeline.faults import is_out_of_space
from pipeline.formats import open_local
from pipeline.generations import objects_of
from pipeline.layout import Layout
from pipeline.part_copies import PartError, check_size, local_copy
from pipeline.printable import printable
from pipeline.storage import Storage, explained, join, redact


@dataclass(frozen=True)
class OpenShard:
    """A commit, and for each of its parts the local files of its objects."""

    folder: str
    layout: Layout
    commit: Commit
    files: tuple[tuple[IO[bytes], ...], ...]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows, some 8 MiB or one picture at a time.

        Raises:
            UserError: a part is not what it should be.
        """
        for part, files in zip(self.commit.parts, self.files, strict=True):
            paths = [Path(f"/dev/fd/{file.fileno()}") for file in files]
            try:
                with open_local(paths, self.layout, part.rows) as opened:
                    yield from opened.tables(columns)
            except (pa.ArrowException, PartError) as error:
                where = redact(join(self.folder, part.path))
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{where}: cannot be read ({reason}); see `tessera verify`"
                ) from error


@contextmanager
def open_shard(
    folder: str, layout: Layout, shard: str, storage: Storage
) -> Iterator[OpenShard | None]:
    """The shard as its commit has it now; None where it is not, or no longer, committed.

    Args:
        folder: OUTPUT or a version of it (`pipeline.versions.current`).
        layout: of its parts.

    Raises:
        UserError: the storage refuses, the commit names what is not there, or this machine cannot
            hold so many files or bytes.
    """
    with ExitStack() as held:
        with explained("read", commit_url(folder, shard)):
            opened = _hold(folder, layout, shard, storage, held)
        yield opened


def _hold(
    folder: str, layout: Layout, shard: str, storage: Storage, held: ExitStack
) -> OpenShard | None:
    failed: tuple[Commit, str] | None = None
    while (commit := commit_now(folder, shard, storage)) is not None:
        if failed is not None and failed[0] == commit:
            raise UserError(f"{failed[1]}; see `tessera verify`")
        files: list[tuple[IO[bytes], ...]] = []
        with ExitStack() as holding:
            try:
                for part in commit.parts:
                    of_part = (_file_of(each, folder, storage) for each in part.objects)
                    files.append(tuple(map(holding.enter_context, of_part)))
            except PartError as error:
                failed = commit, str(error)  # replaced, or removed, while it was read
                continue
            except OSError as error:
                if (remedy := _remedy(error)) is None:
                    raise
                count = sum(len(part.objects) for part in commit.parts)
                size = sum(part.total_bytes for part in commit.parts)
                raise UserError(
                    f"{redact(folder)}: shard {shard}: its {count:,} objects ({size:,} bytes) are "
                    f"held open together: {remedy}"
                ) from error
            held.push(holding.pop_all())
        return OpenShard(folder, layout, commit, tuple(files))
    return None


def _remedy(error: OSError) -> str | None:
    """What to do where this machine has no room for a shard; None for another fault."""
    if error.errno == errno.EMFILE:
        return "more files than this process may have open; raise the limit (`ulimit -n`)"
    if is_out_of_space(error):
        return f"no space left in {tempfile.gettempdir()}; set TMPDIR to a larger disk"
    return None


def commit_now(folder: str, shard: str, storage: Storage) -> Commit | None:
    """A shard's commit; None where there is none.

    Raises:
        UserError: the folder is no OUTPUT any more, or the commit names what is not its shard's.
    """
    try:
        commit = read_commit(folder, shard, storage)
    except FileNotFoundError:
        if not storage.exists(join(folder, DATASET)):
            raise UserError(f"{redact(folder)}: no {DATASET} there any more") from None
        return None
    own = objects_of(commit)
    for published in (each for part in commit.parts for each in part.objects):
        if published.path not in own:
            url = redact(commit_url(folder, shard))
            raise UserError(printable(f"{url}: names {published.path}, no part of its shard"))
    return commit


def _file_of(published: PublishedObject, folder: str, storage: Storage) -> IO[bytes]:
    """An object as a local file that nobody can take away. Raises PartError, which names it."""
    url = join(folder, published.path)
    fs, path = storage.open(url)
    try:
        if not isinstance(fs, LocalFileSystem):
            return local_copy(published, folder, storage)
        with ExitStack() as closing:
            try:
                file = closing.enter_context(Path(path).open("rb"))
            except FileNotFoundError as error:
                raise PartError("missing") from error
            check_size(os.fstat(file.fileno()).st_size, published)
            closing.pop_all()
        return file
    except PartError as error:
        raise PartError(f"{redact(url)}: {error}") from error
