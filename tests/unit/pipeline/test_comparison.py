"""Which shards there are to do: by size and etag as the store tells them, local and on S3."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline import sources
from pipeline.commits import Commit, Computed, PartFile, Source, StageSeconds
from pipeline.comparison import Comparison, Totals, compare
from pipeline.records import Shard
from pipeline.replaced import mark_of
from pipeline.shards import list_shards
from pipeline.sources import source_infos
from pipeline.storage import FileInfo, Storage
from tests.s3 import S3_SERVERS, S3Server

FINGERPRINT = "f" * 64
COMPUTED = Computed(device="cpu", tensor_parallel=2, attention="sdpa", batch_tiles=4)


def commit(shard: str, source: FileInfo, **changes: Any) -> Commit:
    whole = Commit(
        schema_version=1,
        fingerprint=FINGERPRINT,
        shard=shard,
        source=Source(url=f"in/{shard}.tar", size=source.size, etag=source.etag),
        samples=10,
        tiles=40,
        rejects=0,
        truncated_at=None,
        parts=(PartFile(path=f"embeddings/{shard}.parquet", bytes=1, sha256="0" * 64, rows=40),),
        rejects_part=None,
        computed=(COMPUTED,),
        seconds=StageSeconds(read=1, tile=2, embed=3, write=4),
        committed_at="2026-01-01T00:00:00+00:00",
    )
    return whole.model_copy(update=changes)


def names(found: Comparison) -> dict[str, list[str]]:
    return {
        "new": [shard.name for shard in found.new],
        "changed": [shard.name for shard in found.changed],
        "retry": [shard.name for shard in found.retry],
        "vanished": found.vanished,
    }


def test_classes_and_their_sums() -> None:
    shards = [Shard(f"in/{name}.tar", name) for name in "abcdefg"]
    infos: dict[str, FileInfo | None] = {name: FileInfo(100, "x") for name in "abcdefg"}
    infos["g"] = None  # named by INPUT, and not there
    commits = [
        commit("a", FileInfo(100, "x")),
        commit("b", FileInfo(99, "x")),
        commit("c", FileInfo(100, "y"), tiles=60, reused=50),
        commit("d", FileInfo(100, "x"), fingerprint="e" * 64),
        commit("e", FileInfo(100, "x"), rejects=2),
        commit("g", FileInfo(100, "x")),
        commit("z", FileInfo(100, "x")),
    ]
    found = compare(shards, infos, commits, FINGERPRINT)
    assert names(found) == {
        "new": ["f"],
        "changed": ["b", "c", "d"],
        "retry": [],
        "vanished": ["g", "z"],
    }
    assert [shard.name for shard in found.pending] == ["b", "c", "d", "f"]
    assert found.totals["unchanged"] == Totals(2, 200, 20, 80, 80, 12.0)
    assert found.totals["changed"] == Totals(3, 299, 30, 140, 90, 18.0)
    assert found.totals["new"] == Totals(1, 100)
    assert found.totals["vanished"].shards == 2
    before = {shard.name: shard.before for shard in found.pending}
    assert before["f"] == ""
    marks = [before[name] for name in "bcd"]
    assert marks == [mark_of(commit) for commit in commits[1:4]]
    assert len(set(marks)) == 3
    assert {len(mark) for mark in marks} == {32}, "as many as all of INPUT wait in the driver"
    again = compare(shards, infos, commits, FINGERPRINT, retry_rejects=True)
    assert names(again) == {**names(found), "retry": ["e"]}
    assert again.totals["unchanged"].shards == again.totals["retry"].shards == 1
    assert [shard.name for shard in again.pending] == ["b", "c", "d", "e", "f"]


def test_a_tar_that_is_committed_under_another_name_is_not_computed_again() -> None:
    """INPUT was `in/x`, a single shard or a list; now it is `in`."""
    info = FileInfo(100, "x")
    shards = [Shard("s3://u:p@b/in/x/a.tar", "x/a"), Shard("s3://b/in/b.tar", "b")]
    infos: dict[str, FileInfo | None] = {"x/a": info, "b": info}
    source = Source(url="s3://b/in/x/a.tar", size=100, etag="x")
    old = commit("a", info).model_copy(update={"source": source})
    with pytest.raises(UserError, match="shard x/a of INPUT is committed as shard a,") as told:
        compare(shards, infos, [old], FINGERPRINT)
    assert str(told.value).startswith("s3://b/in/x/a.tar: ")
    assert "(the folder s3://b/in/x/, or" in str(told.value)
    both = compare(shards, infos, [old, old.model_copy(update={"shard": "x/a"})], FINGERPRINT)
    assert names(both)["vanished"] == ["a"], "doubled by an earlier version: `--prune` removes it"
    elsewhere = commit("a", info)
    assert names(compare(shards, infos, [elsewhere], FINGERPRINT))["new"] == ["x/a", "b"]


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (FileInfo(1, None), FileInfo(1, None), False),  # a store that names no versions
        (FileInfo(1, None), FileInfo(2, None), True),
        (FileInfo(1, None), FileInfo(1, "x"), True),  # it may be another
        (FileInfo(1, "x"), FileInfo(1, None), True),
    ],
)
def test_stores_without_etags(before: FileInfo, now: FileInfo, changed: bool) -> None:
    found = compare([Shard("u", "a")], {"a": now}, [commit("a", before)], FINGERPRINT)
    assert bool(found.changed) is changed


@pytest.mark.parametrize("worth", [1, 1000])
def test_infos_of_local_shards(worth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WORTH_A_LISTING", worth)
    storage = Storage()
    for name in ("a", "b", "deep/c"):
        path = tmp_path / f"{name}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        os.utime(path, ns=(1_000, 7_000))
    shards = [*list_shards([str(tmp_path)], storage), Shard(f"{tmp_path}/gone.tar", "gone")]
    assert source_infos(shards, storage) == {
        "a": FileInfo(1, "mtime-7000"),
        "b": FileInfo(1, "mtime-7000"),
        "deep/c": FileInfo(6, "mtime-7000"),
        "gone": None,
    }


@pytest.fixture(params=S3_SERVERS)
def server(request: pytest.FixtureRequest, s3_server: Callable[[str], S3Server]) -> S3Server:
    return s3_server(request.param)


def test_what_changed_on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The etag of a listing is that of a read: what was not touched is not computed again."""
    storage = Storage(server.options)
    bucket = f"compare-{secrets.token_hex(4)}"
    keys = [f"in/{number:03d}.tar" for number in range(30)] + ["in/deep/x.tar", "in/é.tar"]
    others = {"in/000.txt": b"n", "in/0290.tar": b"n", "in/zz.tar": b"n"}
    url = server.make_bucket(bucket, {**dict.fromkeys(keys, b"old"), **others})
    shards = list_shards([f"{url}/in"], storage)
    commits = [commit(shard.name, storage.info(shard.url)) for shard in shards]
    client = server.client()
    client.put_object(Bucket=bucket, Key="in/004.tar", Body=b"new")  # the same size
    client.put_object(Bucket=bucket, Key="in/005.tar", Body=b"old")  # put again, the same bytes
    client.put_object(Bucket=bucket, Key="in/new.tar", Body=b"x")
    client.delete_object(Bucket=bucket, Key="in/006.tar")
    looked_up: list[str] = []
    real = Storage.info

    def watch(self: Storage, url: str) -> FileInfo:
        looked_up.append(url.partition("/in/")[2])
        return real(self, url)

    monkeypatch.setattr(Storage, "info", watch)
    shards = list_shards([f"{url}/in"], storage)
    found = compare(shards, source_infos(shards, storage), commits, FINGERPRINT)
    assert names(found) == {"new": ["new"], "changed": ["004"], "retry": [], "vanished": ["006"]}
    assert found.totals["unchanged"].shards == len(keys) + len(others) - 1 - 2
    assert found.totals["new"].source_bytes == 1
    assert looked_up == ["deep/x.tar"], "one of a folder is not worth a listing, all others are"
    # A brace range, of which the store lacks one; the listing goes from its first to its last.
    some = list_shards([f"{url}/in/{{000..025}}.tar"], storage)
    looked_up.clear()
    infos = source_infos(some, storage)
    assert [name for name, info in infos.items() if info is None] == ["006"]
    assert looked_up == ["006.tar"], "a listing alone condemns nothing"
    assert infos["025"] == storage.info(f"{url}/in/025.tar")
