"""An index of a small OUTPUT, and its page as a browser gets it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from jobs.browse import Pages
from jobs.index import build_index
from jobs.page_server import PageServer
from pipeline.storage import Storage
from pipeline.vector_index import VectorIndex
from tests.builders import picture, sample, write_tar
from tests.outputs import extract_plainly

SECONDS = 60
OPENER = build_opener(ProxyHandler({}))


def make_index(root: Path, index: Path, **options: Any) -> str:
    """An index of `root/out`; gives its path."""
    build_index(str(root / "out"), str(index), **options)
    return str(index)


def index_with_twins(root: Path, checkpoint: Path) -> str:
    """Of shard `s`: ten pictures, of which two have the key `k3`; then 40 equal ones."""
    keys = [f"k{n}" for n in range(8)] + ["k3", "k9"]
    members = [
        m for n, key in enumerate(keys) for m in sample(key, picture(60 + 9 * n, 80, seed=n))
    ]
    members += [m for n in range(40) for m in sample(f"same{n}", picture(70, 70, seed=99))]
    write_tar(root / "in/s.tar", members)
    extract_plainly([root / "in"], root / "out", checkpoint)
    return make_index(root, root / "index")


@dataclass
class Site:
    """A page that is being served. Answers are (status, kind, body)."""

    url: str
    pages: Pages

    def get(self, name: str, **parameters: Any) -> tuple[int, str, bytes]:
        query = f"?{urlencode(parameters)}" if parameters else ""
        return self._answer(Request(f"{self.url}{name}{query}"))

    def found(self, name: str, **parameters: Any) -> Any:
        status, _, body = self.get(name, **parameters)
        assert status == 200, body
        return json.loads(body)

    def refused(self, name: str, **parameters: Any) -> tuple[int, str]:
        status, _, body = self.get(name, **parameters)
        return status, json.loads(body)["error"]

    def post(self, data: bytes) -> tuple[int, Any]:
        origin = "/".join(self.url.split("/")[:3])
        request = Request(f"{self.url}picture", data, {"Origin": origin}, method="POST")
        status, _, body = self._answer(request)
        return status, json.loads(body)

    def _answer(self, request: Request) -> tuple[int, str, bytes]:
        try:
            with OPENER.open(request, timeout=SECONDS) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read()


@contextmanager
def browsing(
    index: str, model: str | None = None, urls: dict[str, str] | None = None
) -> Iterator[Site]:
    """Serves an index in this process."""
    storage = Storage()
    pages = Pages(VectorIndex.open(index, storage), storage, model, urls or {})
    try:
        with PageServer(pages.routes, 0) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield Site(server.url, pages)
            finally:
                server.shutdown()
                thread.join()
    finally:
        pages.close()
