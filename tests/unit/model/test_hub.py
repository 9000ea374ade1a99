"""Checkpoints by hub id: the real hub client against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/vit"


class Hub(ThreadingHTTPServer):
    """The few routes of the hub that a download takes, for one repository in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Route)
        self.folder = folder
        self.gated = False
        self.broken = False
        self.branch_lookups = 0
        self.sent: list[str] = []  # files whose bytes were asked for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Route(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = f"/api/models/{REPO}/"
        if path == f"{api}revision/main":
            self.server.branch_lookups += 1
            self.json({"id": REPO, "sha": COMMIT, "siblings": []})
        elif path == f"{api}tree/{COMMIT}":
            self.json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in sorted(self.server.folder.iterdir())
                ]
            )
        elif path.startswith(f"{api}revision/"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif not path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif self.server.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif self.server.broken and path.endswith(".safetensors"):
            self.answer(416)
        else:
            file = self.server.folder / Path(path).name
            body = file.read_bytes()
            if self.command == "GET":
                self.server.sent.append(file.name)
            etag = hashlib.sha256(body).hexdigest()
            self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def json(self, document: object) -> None:
        self.answer(200, json.dumps(document).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    tiny_checkpoint(folder, layout="internvl", num_files=2)
    for surplus in ("pytorch_model.bin", "modeling_intern_vit.py", "README.md"):
        (folder / surplus).write_text("never asked for")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.lm_head.weight"] = "model-00003-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00003-of-00003.safetensors").write_text("the language model's")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


OPEN = """
import sys
from model.checkpoint import open_checkpoint
from model.errors import UserError
try:
    checkpoint = open_checkpoint(sys.argv[1], sys.argv[2] or None)
    print(checkpoint.source, checkpoint.revision, *(f.name for f in checkpoint.files))
except UserError as error:
    print("refused:", error)
"""


def open_in_a_process(url: str, cache: Path, source: str = REPO, revision: str = "") -> str:
    """What a fresh process with this hub and cache makes of `source`: its stdout."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", OPEN, source, revision],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_a_hub_id_downloads_what_it_needs_and_no_more(hub: Hub, tmp_path: Path) -> None:
    shards = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors"
    opened = f"{REPO} {COMMIT} {shards}"
    assert open_in_a_process(hub.url, tmp_path / "cache") == opened
    assert sorted(hub.sent) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
    ]
    assert hub.branch_lookups == 1  # all files are of one commit, should the branch move meanwhile
    assert set(hub.sent[-2:]) == set(shards.split())  # the big ones last
    # Again: from the cache; and from the cache when there is no hub.
    assert open_in_a_process(hub.url, tmp_path / "cache", revision=COMMIT) == opened
    assert len(hub.sent) == 5
    assert open_in_a_process("http://127.0.0.1:9", tmp_path / "cache") == opened


def test_another_architecture_costs_no_download_of_weights(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "config.json").write_text('{"model_type": "clip", "architectures": ["CLIP"]}')
    answer = open_in_a_process(hub.url, tmp_path / "cache")
    assert answer.startswith(f"refused: {REPO}: config.json: not an InternViT (model_type 'clip'")
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    def refusal(source: str = REPO, revision: str = "", url: str = hub.url) -> str:
        answer = open_in_a_process(url, tmp_path / "cache", source, revision)
        assert answer.startswith("refused: ")
        assert "\n" not in answer
        return answer

    assert "no/where: neither a folder here nor a repository on the hub" in refusal("no/where")
    assert f"{REPO}: the hub has no revision gone" in refusal(revision="gone")
    assert "a/b/c: neither a folder here nor a hub id" in refusal("a/b/c")
    undelivered = "no such folder here, not whole in the local hub cache, and the hub does not"
    assert f"{REPO}: {undelivered} deliver it ([Errno 111]" in refusal(url="http://127.0.0.1:9")
    hub.gated = True
    assert f"{REPO}: gated on the hub; accept its terms" in refusal()
    hub.gated, hub.broken = False, True
    answer = refusal()
    assert f"{REPO} at revision {COMMIT}: {undelivered}" in answer
    assert "416" in answer
    (tmp_path / "cache" / "taken").write_text("")
    answer = open_in_a_process(hub.url, tmp_path / "cache" / "taken")
    assert answer.startswith(f"refused: {REPO}: download from the hub failed: ")
