"""`tessera browse` over HTTP: what is found, and what is shown of strangers' pictures."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.browse import COUNT, Pages, browse
from jobs.browse_thumbnails import SIDE, Thumbnailer
from jobs.page_server import Answer, Request
from jobs.query import QueryEncoder
from model.errors import UserError
from pipeline import isolation
from pipeline.pictures import PictureError
from tests.browsing import Site, browsing, index_with_twins, make_index
from tests.builders import cli_env, picture, sample, write_tar
from tests.data.make_tiling_pictures import encode, scene
from tests.hostile.fragile import faulty
from tests.outputs import edit_commit, extract_plainly
from tests.running import still_alive

NUM_PICTURES = 12
EVIL = '<img src=x onerror="alert(1)">\n\u202e'


@pytest.fixture(scope="module")
def index(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(made, tmp_path_factory.mktemp("browse") / "index")


@pytest.fixture(scope="module")
def site(index: str) -> Iterator[Site]:
    with browsing(index) as site:
        yield site


def test_the_page_and_what_it_loads_are_served_here(site: Site) -> None:
    status, kind, page = site.get("")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', page.decode())
    assert links == ["data:,", "browse.css", "browse.js"]
    assert not re.search(r"<script>|<style|style=|\son\w+=", page.decode())
    for name, start in (("browse.css", "text/css"), ("browse.js", "text/javascript")):
        status, kind, body = site.get(name)
        assert status == 200
        assert kind.startswith(start)
        assert b"://" not in body
        assert b"innerHTML" not in body
        assert b"url(" not in body


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(site: Site, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1; 1.4.11: at least 3 to 1 for what shows the focus."""
    css = site.get("browse.css")[2].decode()
    blocks = re.findall(r":root \{([^}]*)\}", css)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[0]))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w+)", blocks[1]))
    texts = {"ink": "page card", "soft": "page card shade", "warm": "page", "on-fill": "fill"}
    for text, papers in texts.items():
        for paper in papers.split():
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    for paper in ("page", "card"):
        assert contrast(colours["fill"], colours[paper]) >= 4.5, paper


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of relative luminances."""
    lighter, darker = sorted(map(luminance, (one, other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(
        weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def test_what_the_index_is(site: Site, made: Path) -> None:
    about = site.found("about")
    assert about["text"] == f"{made}/out: 12 pictures; feature cls, vector thumbnail, flat index"
    assert about["max_upload_bytes"] == 32 << 20


def test_some_pictures_to_begin_with(site: Site) -> None:
    found = site.found("some", seed=1)
    assert len(found["neighbors"]) == min(COUNT, NUM_PICTURES)
    assert found == site.found("some", seed=1)
    assert {n["distance"] for n in found["neighbors"]} == {None}
    places = [(n["shard"], n["key"]) for n in found["neighbors"]]
    assert len(set(places)) == len(places)
    assert site.refused("some") == (400, "seed: expected a number")


def test_nearest_to_a_key(site: Site) -> None:
    found = site.found("key", key="0001", shard="a/b")
    assert found["heading"] == "Nearest to 0001"
    assert (found["asked"]["key"], found["asked"]["shard"]) == ("0001", "a/b")
    assert found["asked"]["sample_index"] == 1
    assert len(found["neighbors"]) == NUM_PICTURES - 1
    distances = [n["distance"] for n in found["neighbors"]]
    assert distances == sorted(distances)
    status, message = site.refused("key", key="0001")
    assert status == 422
    assert message.endswith(": key 0001 is in shards a, a/b; say in which")
    assert site.refused("key", key="nobody")[0] == 422
    assert site.refused("key")[0] == 422


def test_a_neighbour_is_gone_on_from_by_its_sample(made: Path, tmp_path: Path) -> None:
    """A picture that shares its key and shard with another is found, and clicked."""
    with browsing(index_with_twins(tmp_path, made / "ckpt")) as site:
        found = site.post(picture_of(site, "s", 8, "k3"))[1]["neighbors"][0]
        assert (found["key"], found["sample_index"], found["distance"]) == ("k3", 8, 0)
        around = site.found("key", key="k3", shard="s", sample=8)
        assert around["asked"]["sample_index"] == 8
        assert 8 not in {n["sample_index"] for n in around["neighbors"]}
        status, message = site.refused("key", key="k3")
        assert status == 422
        assert message.endswith(
            ": key k3 is that of samples 3, 8 of shard s; give the picture itself, not its key"
        )
        assert site.refused("key", key="k3", sample="x") == (400, "sample: expected a number")


def test_nearest_to_a_picture(site: Site) -> None:
    status, found = site.post(picture_of(site, "a", 3, "0003"))
    assert status == 200
    first = found["neighbors"][0]
    assert (first["key"], first["shard"]) == ("0003", "a")
    assert first["distance"] < 1e-5
    kind, _, data = found["asked"]["picture"].partition(";base64,")
    assert kind == "data:image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(data))) as preview:
        assert max(preview.size) == SIDE


def picture_of(site: Site, shard: str, sample_index: int, key: str) -> bytes:
    """The encoded picture as it is in the source."""
    return site.pages._pictures.picture(shard, site.pages._source(shard), sample_index, key)


def test_a_thumbnail_is_of_the_right_picture(site: Site) -> None:
    for shard, sample_index, key in (("a", 6, "0006"), ("a/b", 2, "0002"), ("a", 0, "0000")):
        status, kind, body = site.get("thumbnail", shard=shard, sample=sample_index, key=key)
        assert (status, kind) == (200, "image/jpeg")
        original = Image.open(io.BytesIO(picture_of(site, shard, sample_index, key)))
        shown = Image.open(io.BytesIO(body))
        assert max(shown.size) == SIDE
        scale = SIDE / max(original.size)
        assert shown.size == tuple(round(side * scale) for side in original.size)
        expected = original.convert("RGB").resize(shown.size, Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(shown, float) - np.asarray(expected, float))
        assert difference.mean() < 12  # patches of noise, squeezed and encoded once more


def test_many_at_once(site: Site) -> None:
    found = site.found("some", seed=2)["neighbors"]

    def thumbnail(number: int) -> bytes:
        n = found[number % len(found)]
        return site.get("thumbnail", shard=n["shard"], sample=n["sample_index"], key=n["key"])[2]

    with ThreadPoolExecutor(16) as pool:
        bodies = list(pool.map(thumbnail, range(48)))
    assert len(set(bodies[: len(found)])) == len(found)
    assert bodies[len(found) : 2 * len(found)] == bodies[: len(found)]


def test_only_pictures_of_the_index_are_shown(site: Site) -> None:
    gone = (404, "its shard has no such picture")
    assert site.refused("thumbnail", shard="a", sample=0, key="other") == gone
    assert site.refused("thumbnail", shard="a", sample=999, key="0000") == gone
    for shard in ("", "b", "../commits/a", "../../in/a", "a\0"):
        refused = site.refused("thumbnail", shard=shard, sample=0, key="0000")
        assert refused == (404, "the index has no such shard")
    assert site.refused("thumbnail", shard="a", sample=-1, key="0000")[0] == 400


def test_bad_pictures_are_told_in_a_line(site: Site) -> None:
    status, found = site.post(b"<html>")
    assert status == 422
    assert found["error"].startswith("the picture: decode: unidentified: 6 bytes in none of the")
    status, found = site.post(picture(60, 50)[:400])
    assert (status, found["error"].startswith("the picture: decode: truncated")) == (422, True)
    status, found = site.post(b"")
    assert status == 422
    assert site.post(picture(60, 50))[0] == 200


def test_nothing_of_a_strangers_file_is_passed_on() -> None:
    exif = Image.Exif()
    exif[270] = "who am I"
    data = encode(scene(64, 48, 1), "JPEG", exif=exif, comment=b"remark") + b"<b>behind</b>"
    for secret in (b"who am I", b"remark", b"behind"):
        assert secret in data
    thumbnailer = Thumbnailer()
    try:
        small = thumbnailer.jpeg(data)
    finally:
        thumbnailer.close()
    for secret in (b"who am I", b"remark", b"behind", b"Exif"):
        assert secret not in small
    with Image.open(io.BytesIO(small)) as shown:
        assert shown.format == "JPEG"
        assert shown.size == (SIDE, SIDE * 48 // 64)


def test_a_picture_that_ends_its_decoder_costs_that_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "CHILD", "tests.hostile.fragile")
    thumbnailer = Thumbnailer()
    try:
        for fault, code in (("load-segv", "crashed"), ("load-memory", "memory")):
            with pytest.raises(PictureError) as caught:
                thumbnailer.jpeg(faulty(picture(90, 60), fault))
            assert caught.value.code == code
        assert thumbnailer.jpeg(picture(90, 60)).startswith(b"\xff\xd8")
    finally:
        thumbnailer.close()


def test_a_source_that_is_gone_or_changed_is_told(copy: Path, tmp_path: Path) -> None:
    index = make_index(copy, tmp_path / "index")
    for shard in ("a", "a/b"):
        url = str(copy / f"in/{shard}.tar")
        edit_commit(copy, shard, lambda commit, url=url: commit["source"].update(url=url))
    thumbnail = {"shard": "a", "sample": 0, "key": "0000"}
    with browsing(index) as site:
        assert site.get("thumbnail", **thumbnail)[0] == 200
    os.utime(copy / "in/a.tar", (1, 1))
    with browsing(index) as site:
        changed = (404, "its shard has changed since it was embedded")
        assert site.refused("thumbnail", **thumbnail) == changed
    (copy / "in/a.tar").rename(copy / "moved.tar")
    with browsing(index) as site:
        assert site.refused("thumbnail", **thumbnail) == (404, "its shard is not there any more")
        assert site.get("thumbnail", shard="a/b", sample=0, key="0000")[0] == 200
        assert len(site.found("key", key="0007")["neighbors"]) == NUM_PICTURES - 1
    with browsing(index, urls={"a": str(copy / "moved.tar")}) as site:
        assert site.get("thumbnail", **thumbnail)[0] == 200


def test_an_input_that_has_other_shards_is_told(
    index: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(made / "in", tmp_path / "moved")
    with browsing(index) as other:  # its port is taken: what comes before it is told
        port = int(other.url.split(":")[2].split("/")[0])
        with pytest.raises(UserError) as caught:
            browse(index, port, inputs=[str(moved / "a")])
        assert str(caught.value) == (
            f"--input {moved}/a: has no shard of the index: it has b, the index a; give the folder "
            "or pattern below which the names are the same"
        )
        with pytest.raises(UserError, match="cannot listen on port"):
            browse(index, port, inputs=[str(moved)])
        assert capsys.readouterr().err == ""
        (moved / "a.tar").unlink()
        with pytest.raises(UserError, match="cannot listen on port"):
            browse(index, port, inputs=[str(moved)])
    assert capsys.readouterr().err == (
        f"tessera: --input {moved}: lacks 1 of 2 shards of the index (the first: a); those are "
        "looked for where they were\n"
    )


def test_a_shard_that_was_computed_again(copy: Path, tmp_path: Path) -> None:
    """What the index has of it are other pictures, whatever their keys."""
    index = make_index(copy, tmp_path / "index")
    edit_commit(copy, "a", lambda commit: commit["parts"][0].update(sha256="0" * 64))
    (copy / "out/commits/a/b.json").unlink()
    told = (404, "its shard has changed since it was indexed; run `tessera index` again")
    with browsing(index) as site:
        assert site.refused("thumbnail", shard="a", sample=0, key="0000") == told
        assert site.refused("thumbnail", shard="a/b", sample=0, key="0000") == told


def test_a_model_that_is_gone_is_told_when_it_is_needed(copy: Path, tmp_path: Path) -> None:
    index = make_index(copy, tmp_path / "index")
    with browsing(index, model=str(copy / "none")) as site:
        status, found = site.post(picture(60, 50))
        assert (status, "none: no such folder" in found["error"]) == (422, True)
        assert len(site.found("key", key="0007")["neighbors"]) == NUM_PICTURES - 1


def test_what_strangers_wrote_is_text(made: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "in/s.tar", sample("k", picture(60, 50), EVIL + "x" * 9000))
    extract_plainly([tmp_path / "in"], tmp_path / "out", made / "ckpt", carry=("txt",))
    with browsing(make_index(tmp_path, tmp_path / "index")) as site:
        status, kind, body = site.get("some", seed=0)
        assert (status, kind) == (200, "application/json")
        (neighbor,) = json.loads(body)["neighbors"]
    shown = neighbor["shown"]["caption"]
    assert shown.startswith(r'<img src=x onerror="alert(1)">\n\u202ex')
    assert len(shown) < 500
    assert set(neighbor) == {"key", "shard", "sample_index", "caption", "distance", "shown"}


def start(index: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The command as a script starts it in the background, deaf to SIGINT at first; with the
    address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "browse", index, "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cli_env(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(index: str, signum: int) -> None:
    process, url = start(index)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", url)
        site = Site(url, None)  # type: ignore[arg-type]
        assert site.get("thumbnail", shard="a", sample=0, key="0000")[0] == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 1
        for target in [process.pid, *(child.pid for child in children)]:
            if os.getpgid(target) == os.getpgid(process.pid):
                os.kill(target, signum)  # as a terminal does to all of its foreground
        out, err = process.communicate(timeout=240)
        hint = "tessera: open this address; Ctrl-C ends it\n"
        assert (process.returncode, out, err) == (0, "", hint)
        assert still_alive(children) == []
    finally:
        process.kill()


def test_it_ends_without_the_queries_that_wait(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    come, begun, answer = threading.Semaphore(0), threading.Event(), Pages.picture
    embedded = []

    def noted(pages: Pages, request: Request) -> Answer:
        come.release()
        return answer(pages, request)

    def held(encoder: QueryEncoder, data: bytes, name: str) -> np.ndarray:
        embedded.append(data)
        begun.set()
        assert site.pages._thread._closing.wait(60)
        raise UserError("is not shown")

    monkeypatch.setattr(Pages, "picture", noted)
    monkeypatch.setattr(QueryEncoder, "vector", held)
    with ThreadPoolExecutor(5) as pool:
        with browsing(index) as site:
            asked = [pool.submit(site.post, picture(60, 50 + n)) for n in range(5)]
            for _ in asked:
                assert come.acquire(timeout=60)
            assert begun.wait(60)
        ended = [one.exception(60) for one in asked]
    assert len(embedded) == 1
    assert sum(isinstance(error, ConnectionError) for error in ended) == 4


def test_what_cannot_be_served(index: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an INDEX of `tessera index`"):
        browse(str(tmp_path), 0)
    with browsing(index) as site:
        port = int(site.url.split(":")[2].split("/")[0])
        with pytest.raises(UserError, match=f"cannot listen on port {port} .*another with --port"):
            browse(index, port)
