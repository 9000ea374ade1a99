"""INPUT in all its forms, and the names that shards get from it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import UserError
from pipeline.records import Shard
from pipeline.shards import list_shards, probe_shards
from pipeline.storage import Storage, StorageError
from tests.s3 import S3_SERVERS, S3Server

FILES = ("00000.tar", "00001.tar", "00002.tar", "notes.txt", "deep/00000.tar", "deep/er/x.tar")
EVERY_FORM = [
    # inputs below the root, and the names expected
    (["00001.tar"], ["00001"]),
    (["deep/er/x.tar"], ["x"]),
    (["00001.tar", "00000.tar"], ["00000", "00001"]),
    (["deep/er/x.tar", "00000.tar"], ["00000", "deep/er/x"]),
    (["deep/er/x.tar", "deep/00000.tar"], ["00000", "er/x"]),
    (["{00000..00002}.tar"], ["00000", "00001", "00002"]),
    (["{00001..00004}.tar"], ["00001", "00002", "00003", "00004"]),  # not looked up here
    (["{deep/,}00000.tar"], ["00000", "deep/00000"]),
    (["*.tar"], ["00000", "00001", "00002"]),
    (["0000?.tar"], ["00000", "00001", "00002"]),
    (["0000[02].tar"], ["00000", "00002"]),
    (["deep/*.tar"], ["00000"]),
    (["*/00000.tar"], ["deep/00000"]),
    (["**/*.tar"], ["00000", "00001", "00002", "deep/00000", "deep/er/x"]),
    (["{deep,nowhere}/*.tar"], ["deep/00000"]),
    ([""], ["00000", "00001", "00002", "deep/00000", "deep/er/x"]),
    (["deep"], ["00000", "er/x"]),
    (["deep/"], ["00000", "er/x"]),
    (["deep", "00002.tar"], ["00002", "deep/00000", "deep/er/x"]),
]


@pytest.fixture(scope="module", params=["local", *S3_SERVERS])
def root(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    s3_server: Callable[[str], S3Server],
) -> tuple[Storage, str]:
    """A folder with FILES; its files hold their own names."""
    if request.param == "local":
        folder = tmp_path_factory.mktemp("in")
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        return Storage(), str(folder)
    server = s3_server(request.param)
    bucket = server.make_bucket(
        f"in-{secrets.token_hex(4)}", {f"here/{name}": name.encode() for name in FILES}
    )
    return Storage(server.options), f"{bucket}/here"


def names(shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards]


@pytest.mark.parametrize(("inputs", "expected"), EVERY_FORM)
def test_every_form_of_input(
    root: tuple[Storage, str], inputs: list[str], expected: list[str]
) -> None:
    storage, folder = root
    shards = list_shards([f"{folder}/{entry}" for entry in inputs], storage)
    assert names(shards) == expected
    for shard in shards:
        path = shard.url.removeprefix(f"{folder}/")
        if path in FILES:
            assert storage.read(shard.url).decode() == path


def test_a_list_with_comments(root: tuple[Storage, str], tmp_path: Path) -> None:
    storage, folder = root
    file = tmp_path / "list.txt"
    lines = ["# two shards", f"{folder}/deep/00000.tar", "", f"  {folder}/0000{{1..2}}.tar  "]
    file.write_text("\n".join(lines))
    assert names(list_shards([f"@{file}"], storage)) == ["00001", "00002", "deep/00000"]
    file.write_text(f"{folder}/deep/00000.tar\n")
    assert names(list_shards([f"@{file}"], storage)) == ["00000"]


@pytest.mark.parametrize("pattern", ["in", "in/*.tar", "in/{0..1}.tar", "./in/../in/*.tar"])
def test_paths_below_the_current_folder(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks of the job may run in another folder: URLs must be absolute."""
    (tmp_path / "in").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "in" / name).touch()
    monkeypatch.chdir(tmp_path)
    shards = list_shards([pattern], Storage())
    assert names(shards) == ["0", "1"]
    assert [shard.url for shard in shards] == [f"{tmp_path}/in/0.tar", f"{tmp_path}/in/1.tar"]
    with_protocol = list_shards([f"file://{tmp_path}/in/*.tar"], Storage())
    assert with_protocol == shards


def test_urls_with_signatures() -> None:
    url = "https://host/bucket/{0}.tar?X-Amz-Credential=a/b/c&X-Amz-Signature={1}"
    urls = [url.format(number, "f") for number in range(2)]
    assert list_shards(urls[:1], Storage()) == [Shard(urls[0], "0")]
    assert list_shards(urls, Storage()) == [Shard(urls[0], "0"), Shard(urls[1], "1")]
    braces = url.format("{0..1}", "f")
    assert list_shards([braces], Storage()) == [Shard(urls[0], "0"), Shard(urls[1], "1")]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["memory://x/*.tar"], "memory://x/*.tar: memory:// lives in one process"),
        (["/data/0.tar", "memory://x/0.tar"], "memory:// lives in one process"),
        (["/data/0.tar", "/data/0.tar"], "shard 0.tar is listed 2 times"),
        (["/data/a.tar", "/data/a-00001.tar"], "names a and a-00001 collide"),
        (["/data/{0..3.tar"], "/data/{0..3.tar: not a brace range"),
        (["/nowhere/*.tar"], "no shards in /nowhere/*.tar: expected *.tar"),
        (["/nowhere/at-all"], "cannot list /nowhere/at-all: not found"),
        (["@/nowhere/list.txt"], "@/nowhere/list.txt: cannot read the list of shards"),
        (["https://me:pw@host/{0..3.tar?token=abc"], "https://host/{0..3.tar: not a brace range"),
    ],
)
def test_what_is_refused(inputs: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        list_shards(inputs, Storage())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not {"me:pw", "token"} & set(str(caught.value).replace("@", "?").split("?"))


def test_names_of_numbered_shards_do_not_collide() -> None:
    listed = list_shards(["/d/a-00000.tar", "/d/a-00001.tar", "/d/b.tar"], Storage())
    assert names(listed) == ["a-00000", "a-00001", "b"]


def test_a_folder_without_shards(root: tuple[Storage, str]) -> None:
    storage, folder = root
    with pytest.raises(UserError, match="not found"):
        list_shards([f"{folder}/nowhere"], storage)
    with pytest.raises(UserError, match="no shards in"):
        list_shards([f"{folder}/nowhere/*.tar"], storage)


def test_probing_finds_that_nothing_is_there(root: tuple[Storage, str]) -> None:
    storage, folder = root
    one_there = list_shards([f"{folder}/{{00002..00009}}.tar"], storage)
    probe_shards(one_there, storage)
    none_there = list_shards([f"{folder}/{{00003..00009}}.tar"], storage)
    with pytest.raises(StorageError, match=r"none of the shards was found \(tried .*00003\.tar"):
        probe_shards(none_there, storage)


def test_probing_tells_a_refusal_from_an_absence(tmp_path: Path) -> None:
    shards = list_shards([f"{tmp_path}/0.tar"], Refusing())
    with pytest.raises(StorageError, match="access refused"):
        probe_shards(shards, Refusing())


class Refusing(Storage):
    def info(self, url: str) -> None:  # type: ignore[override]
        raise PermissionError("status 403")


def test_the_etag_of_a_local_shard_is_its_time(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"1")
    os.utime(shard, ns=(5, 7))
    assert Storage().info(str(shard)).etag == "mtime-7"
