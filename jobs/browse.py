"""`tessera browse INDEX`: a page on loopback that shows what is nearest to a picture."""

from __future__ import annotations

import base64
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.browse_thumbnails import Thumbnailer
from jobs.html_elements import cut
from jobs.one_thread import OneThread
from jobs.page_server import (
    MAX_UPLOAD_BYTES,
    Answer,
    PageServer,
    RefusedError,
    Request,
    Routes,
    as_json,
)
from jobs.query import QueryEncoder, indexed_folder
from jobs.search import nearest_to_key, nearest_to_vector, to_json
from model.errors import UserError
from pipeline.commits import Source
from pipeline.index_record import IndexRecord, commit_digest
from pipeline.isolation import IsolationError
from pipeline.open_shards import commit_now
from pipeline.pictures import PictureError
from pipeline.printable import printable
from pipeline.shards import list_shards
from pipeline.source_pictures import SourceGoneError, SourcePictures
from pipeline.storage import Storage, explained, redact
from pipeline.vector_index import Neighbor, VectorIndex

COUNT = 18  # neighbours on the page
KEEP_SECONDS = 600  # a thumbnail, in the browser
SOURCES_KNOWN = 1000
PAGE_FILES = {
    "": ("browse.html", "text/html; charset=utf-8"),
    "browse.css": ("browse.css", "text/css; charset=utf-8"),
    "browse.js": ("browse.js", "text/javascript; charset=utf-8"),
}


class Pages:
    """What the server answers. Threads may ask at the same time."""

    def __init__(
        self, index: VectorIndex, storage: Storage, model: str | None, urls: Mapping[str, str]
    ) -> None:
        """`model` and `urls`: the checkpoint, and shards of INPUT, that are not where OUTPUT says.

        Raises:
            UserError: OUTPUT is not what was indexed.
        """
        record = index.record
        self._index = index
        self._storage = storage
        self._folder = indexed_folder(record)
        self._commits = _live_commits(record)
        self._encoder = QueryEncoder(record, storage, model)
        self._thread = OneThread("queries")  # uses the encoder
        image_key: Sequence[str] = self._encoder.dataset.settings["image_key"]
        self._pictures = SourcePictures(image_key, storage, urls)
        self._source = lru_cache(SOURCES_KNOWN)(self._read_source)
        self._thumbnailer = Thumbnailer()

    @property
    def routes(self) -> Routes:
        return {
            **{("GET", name): _page_file(*PAGE_FILES[name]) for name in PAGE_FILES},
            ("GET", "about"): self.about,
            ("GET", "some"): self.some,
            ("GET", "key"): self.key,
            ("GET", "thumbnail"): self.thumbnail,
            ("POST", "picture"): self.picture,
        }

    def close(self) -> None:
        """Waits for the query that is computed, not for those behind it."""
        self._thread.close(self._encoder.close)
        self._thumbnailer.close()

    def about(self, request: Request) -> Answer:
        record = self._index.record
        text = (
            f"{redact(record.output)}: {record.live_vectors:,} pictures; feature {record.feature}, "
            f"vector {record.vector}, {record.kind} index"
        )
        return as_json({"text": printable(text), "max_upload_bytes": MAX_UPLOAD_BYTES})

    def some(self, request: Request) -> Answer:
        """Pictures to begin with: those nearest to a random direction."""
        rng = np.random.default_rng(_number(request, "seed"))
        direction = rng.standard_normal(self._index.record.width, np.float32)
        found = nearest_to_vector(self._index, direction, COUNT)
        return _found("Some pictures of the index", None, found, with_distance=False)

    def key(self, request: Request) -> Answer:
        key, shard = request.parameters.get("key", ""), request.parameters.get("shard")
        sample_index = _number(request, "sample") if "sample" in request.parameters else None
        around = nearest_to_key(self._index, key, shard, COUNT, sample_index)
        return _found(f"Nearest to {key}", _shown(around.asked), around.neighbors)

    def picture(self, request: Request) -> Answer:
        vector = self._thread.do(lambda: self._vector(request))
        found = nearest_to_vector(self._index, vector, COUNT)
        preview = base64.b64encode(self._jpeg(request.body)).decode()
        asked = {"picture": f"data:image/jpeg;base64,{preview}"}
        return _found("Nearest to your picture", asked, found)

    def thumbnail(self, request: Request) -> Answer:
        key, shard = (request.parameters.get(name, "") for name in ("key", "shard"))
        try:
            source = self._source(shard)
            data = self._pictures.picture(shard, source, _number(request, "sample"), key)
        except SourceGoneError as error:
            raise RefusedError(HTTPStatus.NOT_FOUND, str(error)) from error
        return Answer("image/jpeg", self._jpeg(data), keep_seconds=KEEP_SECONDS)

    def _vector(self, request: Request) -> npt.NDArray[np.float32]:
        if request.is_given_up():
            raise ConnectionAbortedError("nobody waits for the answer")
        return self._encoder.vector(request.body, "the picture")

    def _jpeg(self, data: bytes) -> bytes:
        try:
            return self._thumbnailer.jpeg(data)
        except (PictureError, IsolationError) as error:
            raise UserError(f"the picture cannot be shown: {error}") from error

    def _read_source(self, shard: str) -> Source:
        """Where a shard's pictures come from; only shards of the index are looked for."""
        if shard not in self._commits:
            raise SourceGoneError("the index has no such shard")
        with explained("read", self._folder):
            commit = commit_now(self._folder, shard, self._storage)
        if commit is None or commit_digest(commit) != self._commits[shard]:
            raise SourceGoneError(
                "its shard has changed since it was indexed; run `tessera index` again"
            )
        return commit.source


def browse(
    index: str,
    port: int,
    model: str | None = None,
    inputs: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM; prints its address.

    Raises:
        UserError: INDEX, its OUTPUT, its shards in INPUT or the port cannot be had.
    """
    storage = Storage(storage_options or {})
    opened = VectorIndex.open(index, storage)
    urls = _where_now(opened.record, inputs, storage) if inputs else {}
    pages = Pages(opened, storage, model, urls)
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins deaf to SIGINT
        signal.signal(signum, signal.default_int_handler)
    try:
        with PageServer(pages.routes, port) as server:
            print(server.url, flush=True)
            print("tessera: open this address; Ctrl-C ends it", file=sys.stderr)
            server.serve_forever()
    except KeyboardInterrupt:
        return
    finally:
        pages.close()


def _live_commits(record: IndexRecord) -> dict[str, str]:
    """The digest of the commit of each shard of an index, by its name."""
    return {
        shard.shard: shard.commit
        for segment in record.segments
        for shard in segment.shards
        if shard.live
    }


def _where_now(record: IndexRecord, inputs: Sequence[str], storage: Storage) -> dict[str, str]:
    """Where INPUT has the shards of an index, by name; a line tells how many it lacks.

    Raises:
        UserError: it has none of them.
    """
    urls = {shard.name: shard.url for shard in list_shards(inputs, storage)}
    shards = _live_commits(record)
    missing = sorted(shards.keys() - urls)
    given = f"--input {' '.join(map(redact, inputs))}"
    if missing and len(missing) == len(shards):
        raise UserError(
            f"{given}: has no shard of the index: it has {min(urls)}, the index {missing[0]}; give "
            "the folder or pattern below which the names are the same"
        )
    if missing:
        told = f"{given}: lacks {len(missing)} of {len(shards)} shards of the index"
        told += f" (the first: {missing[0]}); those are looked for where they were"
        print(f"tessera: {printable(told)}", file=sys.stderr)
    return urls


def _page_file(name: str, kind: str) -> Callable[[Request], Answer]:
    answer = Answer(kind, files("jobs").joinpath(name).read_bytes())
    return lambda request: answer


def _number(request: Request, name: str) -> int:
    digits = request.parameters.get(name, "")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12):
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: expected a number")
    return int(digits)


def _shown(neighbor: Neighbor) -> dict[str, Any]:
    """Key and shard as they are, to ask for them, and all texts as they may be shown."""
    texts = {"key": neighbor.key, "shard": neighbor.shard, "caption": neighbor.caption or ""}
    return {
        **to_json(neighbor),
        "shown": {name: printable(cut(text)) for name, text in texts.items()},
    }


def _found(
    heading: str, asked: Any, neighbors: Sequence[Neighbor], with_distance: bool = True
) -> Answer:
    shown = [_shown(neighbor) for neighbor in neighbors]
    if not with_distance:
        shown = [{**each, "distance": None} for each in shown]
    return as_json({"heading": printable(cut(heading)), "asked": asked, "neighbors": shown})
