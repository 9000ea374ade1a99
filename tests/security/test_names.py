"""No name from outside is a path: not a member's of a tar, and no shard's leaves OUTPUT."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from pipeline.chunks import TileSettings
from pipeline.commits import commit_url
from pipeline.records import Shard
from pipeline.samples import ReadSettings
from pipeline.shards import list_shards
from pipeline.stock import take_stock
from pipeline.storage import Storage, join
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import files_below, picture, tar_bytes
from tests.s3 import moto
from tests.stages import (
    IMAGE_KEY,
    STORAGE,
    TILING,
    WIDTH,
    compute_shard,
    encode,
    part_settings,
)

MARK = "tessera-evil"
EVIL_NAMES = [
    f"../../{MARK}-1.jpg", f"/tmp/{MARK}-2.jpg", f"/etc/{MARK}-3.jpg", f"a/../../../{MARK}-4.jpg",
    f"./{MARK}-5.jpg", f"//{MARK}-6.jpg", f"C:\\{MARK}-7.jpg", f"..\\..\\{MARK}-8.jpg",
    f"~/{MARK}-9.jpg", f"$HOME/{MARK}-10.jpg", f"-rf {MARK}-11.jpg", f"a\n{MARK}-12.jpg",
    f"`touch {MARK}-13`.jpg", f"file:///tmp/{MARK}-14.jpg", f"s3://bucket/{MARK}-15.jpg",
    f"memory://{MARK}-16.jpg", f"{MARK}-17/dataset.json.jpg",
]  # fmt: skip


def evil_tar() -> bytes:
    """Pictures with names that lead elsewhere, then links and devices of such names."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(EVIL_NAMES):
            data = picture(40, 40, seed=number)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
             tarfile.DIRTYPE)
        ):  # fmt: skip
            entry = tarfile.TarInfo(f"../../{MARK}-link-{number}.jpg")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    return sink.getvalue()


def named_so(*folders: Path) -> set[str]:
    """Paths that carry the mark in these folders, whoever made them."""
    return {str(path) for folder in folders for path in folder.glob(f"*{MARK}*")}


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every path that Python opens inside, by whatever call. A hook can never be taken off."""
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    yield opened
    watching = False


def run_plainly(tar: Path, output: Path, name: str = "s") -> None:
    parts = part_settings(output, {"cls": WIDTH})
    read, tile = ReadSettings(STORAGE, IMAGE_KEY), TileSettings(TILING, (), 60.0, 8)
    complete = compute_shard(Shard(str(tar), name), read, tile, encode, parts)
    assert complete.failure is None, complete.failure
    finalize_shard(complete, FinalizeSettings(parts, "f" * 64, 1 << 29))


def test_members_names_are_keys_and_never_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "a" / "b" / "c"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    tar = tmp_path / "s.tar"
    tar.write_bytes(evil_tar())
    output = work / "out"
    with opened_files() as opened:
        run_plainly(tar, output)
    monkeypatch.undo()
    assert str(tar) in opened, "or nothing is seen"
    rows = pq.read_table(output / "embeddings/s.parquet")
    keys = list(dict.fromkeys(rows["key"].to_pylist()))
    assert len(keys) >= len(EVIL_NAMES) - 4, "the test is about pictures that were embedded"
    assert f"/etc/{MARK}-3" in keys
    assert not any("link" in key for key in keys), "links and devices are no samples"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "s.tar"]
    assert set(files_below(output)) - {"rejects/s.parquet"} == {
        "commits/s.json",
        "embeddings/s.parquet",
    }
    elsewhere = (Path("/"), Path("/tmp"), Path("/etc"), Path.home(), work, work.parent, Path.cwd())
    assert named_so(*elsewhere) == set()
    assert not any(MARK in path for path in opened)


BAD_NAMES = [
    "../x", "a/../../x", "..", "a/..", "a\nb", "a\x00b", "a\x1b]2Jb", "a\rb", "a\u2028b", "a\x7fb",
    "a\u202eb", "./x", "a/./b", ".", "a/.",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_shard_whose_name_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = "http://127.0.0.1:9"
    with pytest.raises(UserError) as refused:
        list_shards([f"{folder}/in/ok.tar", f"{folder}/in/{name}.tar"], STORAGE)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder}/in/ok.tar\n{folder}/in/{name}.tar\n")
    if not set(name) & set("\n\r\u2028"):  # a list has a shard a line
        with pytest.raises(UserError):
            list_shards([f"@{listed}"], STORAGE)


GOOD_NAMES = [
    "-rf", "--help", "dataset", "dataset.json", "_runs", "commits", "a b", "Zürich", "東京", "~",
    "$HOME", "a;b", "..a", "...", "%2e%2e", "a\\..\\b", "#x", "x.json",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_odd_names_stay_below_their_folders(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / f"{name}.tar"
    source.parent.mkdir()
    source.write_bytes(tar_bytes([("k.jpg", picture(40, 40))]))
    (shard,) = list_shards([str(source.parent)], STORAGE)
    assert shard.name == name
    run_plainly(source, tmp_path / "out", shard.name)
    made = set(files_below(tmp_path / "out"))
    assert made == {f"commits/{name}.json", f"embeddings/{name}.parquet"}
    stock = take_stock(str(tmp_path / "out"), [name], STORAGE)
    assert (stock.committed, stock.strays) == ({name}, [])


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="*?[]{}#"), min_size=1, max_size=30))
def test_any_name_is_refused_or_stays_below_its_folder(name: str) -> None:
    inputs = [f"http://127.0.0.1:9/in/{name}.tar", "http://127.0.0.1:9/in/ok.tar"]
    try:
        shards = list_shards(inputs, STORAGE)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    for shard in shards:
        for root in ("/out", "s3://b/out"):
            url = commit_url(root, shard.name)
            assert url.startswith(f"{root}/commits/")
            below = os.path.normpath(url.removeprefix(root))
            assert below.startswith("/commits/")
            assert url.removeprefix(root) == below, "what is listed is what was written"


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[Any, Storage]]:
    with moto() as server:
        server.make_bucket("names")
        yield server, Storage(server.options)


@pytest.mark.parametrize("key", ["in/./x.tar", "in/a\x1b]2Jb.tar"])
def test_keys_of_a_bucket_may_be_anything(key: str, bucket: tuple[Any, Storage]) -> None:
    server, storage = bucket
    client = server.client()
    client.put_object(Bucket="names", Key="in/ok.tar", Body=b"")
    client.put_object(Bucket="names", Key=key, Body=b"")
    try:
        with pytest.raises(UserError) as refused:
            list_shards(["s3://names/in"], storage)
        assert "\n" not in str(refused.value)
        assert "\x1b" not in str(refused.value)
    finally:
        client.delete_object(Bucket="names", Key=key)


def test_slashes_in_a_key_do_not_make_a_path_absolute(bucket: tuple[Any, Storage]) -> None:
    server, storage = bucket
    client = server.client()
    client.put_object(Bucket="names", Key="double//etc/x.tar", Body=b"")
    for shard in list_shards(["s3://names/double"], storage):
        assert shard.name == "etc/x"
        assert join("/out", "commits", f"{shard.name}.json") == "/out/commits/etc/x.json"


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.tar"
    with open(path, "wb"):  # noqa: PTH123
        pass
    with pytest.raises(UserError) as refused:
        list_shards([str(tmp_path)], STORAGE)
    str(refused.value).encode()


def test_a_link_in_an_output_is_not_followed_when_a_dead_run_is_removed(tmp_path: Path) -> None:
    """Who may write to OUTPUT must not be able to have other files of its owner removed."""
    precious = tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    (precious / "deep" / "file").write_text("kept")
    output = tmp_path / "out"
    (output / "_runs").mkdir(parents=True)
    (output / "embeddings").mkdir()
    (output / "_runs" / "link").symlink_to(precious)
    (output / "embeddings" / "link").symlink_to(precious)
    strays = take_stock(str(output), ["a"], STORAGE).strays
    STORAGE.remove(*(join(str(output), name) for name in strays))
    STORAGE.remove(join(str(output), "_runs"))
    assert (precious / "deep" / "file").read_text() == "kept"
