"""A shard that is published again gets new names, and a kill anywhere leaves readers one of two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from pipeline.audit import commit_problems
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, Dataset, commit_url
from pipeline.generations import (
    Owner,
    colliding,
    generation_of,
    objects_of,
    owners,
    part_paths,
    rejects_path,
)
from pipeline.ledger import CompleteShard
from pipeline.records import Shard
from pipeline.samples import ReadSettings
from pipeline.shards import list_shards
from pipeline.stages import finalize_stage
from pipeline.stock import take_stock
from pipeline.storage import Storage
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import files_below, samples, write_tar
from tests.stages import IMAGE_KEY, STORAGE, TILING, compute_shard, encode, part_settings

FINGERPRINT = "f" * 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.parquet", [Owner("a/b", 1)]),
        ("a-00001.parquet", [Owner("a-00001", 1), Owner("a", 1)]),
        ("a.g00002.parquet", [Owner("a.g00002", 1), Owner("a", 2)]),
        (
            "a.g00012-00000.parquet",
            [Owner("a.g00012-00000", 1), Owner("a.g00012", 1), Owner("a", 12)],
        ),
        ("a.g00001.parquet", [Owner("a.g00001", 1)]),  # the first has no number
        ("a-00007.g00003.parquet", [Owner("a-00007.g00003", 1), Owner("a-00007", 3)]),
    ],
)
def test_whose_an_object_may_be(name: str, expected: list[Owner]) -> None:
    assert owners(name) == expected


@pytest.mark.parametrize("shard", ["a", "x/a-00007", "a.g00002", "a.b"])
@pytest.mark.parametrize("generation", [1, 2, 99999])
def test_names_are_read_back(shard: str, generation: int) -> None:
    for count in (1, 3):
        paths = [*part_paths(shard, generation, count), rejects_path(shard, generation)]
        assert len(set(paths)) == count + 1
        for path in paths:
            assert Owner(shard, generation) in owners(path.partition("/")[2]), path


def test_colliding_names() -> None:
    assert colliding(["a", "b", "a-0001", "a.g2", "a.g00001"]) is None
    assert colliding(["a-00000", "a-00001", "a.g00002"]) is None
    assert colliding(["a-00001", "a"]) == ("a", "a-00001")
    assert colliding(["a.g00002", "a"]) == ("a", "a.g00002")
    assert colliding(["a.g00002-00000", "a"]) == ("a", "a.g00002-00000")
    with pytest.raises(UserError, match=r"names a and a\.g00002 collide"):
        list_shards(["/d/a.tar", "/d/a.g00002.tar"], STORAGE)


def shard_of(folder: Path, count: int, seed: int = 0, bad: bool = False) -> Path:
    members = samples(count, seed)
    if bad:
        members[0] = (members[0][0], b"no picture")
    return write_tar(folder / f"{seed}.tar", members)


def settings_of(output: Path, target_part_bytes: int = 1 << 30) -> FinalizeSettings:
    return FinalizeSettings(part_settings(output), FINGERPRINT, target_part_bytes)


def complete(source: Path, settings: FinalizeSettings, name: str = "s") -> CompleteShard:
    read, tile = ReadSettings(STORAGE, IMAGE_KEY), TileSettings(TILING, (), 60.0, 6)
    return compute_shard(Shard(str(source), name), read, tile, encode, settings.parts)


def finalize(
    source: Path, settings: FinalizeSettings, before: Commit | None = None, name: str = "s"
) -> Commit:
    return finalize_shard(complete(source, settings, name), settings, before)


def published(output: Path) -> set[str]:
    return {name for name in files_below(output) if not name.startswith("_runs/")}


def test_generation_after_generation_leaves_its_own_objects_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    small = settings_of(output, target_part_bytes=1000)
    first = finalize(shard_of(tmp_path, 8, 1, bad=True), small)
    assert [p.path for p in first.parts] == part_paths("s", 1, len(first.parts))
    assert (generation_of(first), len(first.parts) > 1) == (1, True)
    second = finalize(shard_of(tmp_path, 6, 2, bad=True), small, first)
    assert [p.path for p in second.parts] == part_paths("s", 2, len(second.parts))
    assert second.rejects_part is not None
    assert second.rejects_part.path == "rejects/s.g00002.parquet"
    assert len(second.parts) > 1
    assert published(output) == {*objects_of(second), "commits/s.json"}
    third = finalize(shard_of(tmp_path, 3, 3), settings_of(output), second)
    assert published(output) == {"embeddings/s.g00003.parquet", "commits/s.json"}
    assert generation_of(third) == 3
    for commit in (first, second, third):
        made = Dataset.describe("m", None, "w", {}, {"cls": 6}, "0").model_copy(
            update={"fingerprint": FINGERPRINT}
        )
        assert commit_problems(commit, made) == []
    mixed = second.model_copy(update={"rejects_part": first.rejects_part})
    assert commit_problems(mixed, made) == [
        "commits/s.json: its rejects have another name: rejects/s.parquet"
    ]


def test_a_strangers_commit_owns_nothing_outside_its_shard(tmp_path: Path) -> None:
    first = finalize(shard_of(tmp_path, 2), settings_of(tmp_path / "out"))
    part = first.parts[0]
    paths = ["embeddings/t.parquet", "../s.parquet", "embeddings/../s.parquet", "dataset.json"]
    parts = tuple(part.model_copy(update={"path": path}) for path in [*paths, "rejects/s.parquet"])
    assert objects_of(first.model_copy(update={"parts": parts})) == {"rejects/s.parquet": 1}


class Killed(BaseException):
    """Nobody catches it: the process is gone."""


class KilledStorage(Storage):
    """Writes or removes so many times, and is then killed: before the next, or after it."""

    left = 0

    def _spend(self) -> None:
        KilledStorage.left -= 1
        if KilledStorage.left < 0:
            raise Killed

    def publish_bytes(self, url: str, data: bytes) -> None:
        self._spend()
        super().publish_bytes(url, data)

    def publish_file(self, url: str, local: Path) -> None:
        self._spend()
        super().publish_file(url, local)

    def remove(self, *urls: str) -> None:
        for url in urls:
            self._spend()
            super().remove(url)

    def remove_objects(self, *urls: str) -> None:
        for url in urls:
            self._spend()
            super().remove_objects(url)


def test_a_kill_anywhere_leaves_the_old_or_the_new_whole(tmp_path: Path) -> None:
    """Between any two changes of the storage; the next run removes what no commit names."""
    old_source, new_source = shard_of(tmp_path, 8, 1, bad=True), shard_of(tmp_path, 7, 2, bad=True)
    states = []
    for number in range(40):
        output = tmp_path / f"out-{number}"
        settings = settings_of(output, target_part_bytes=1000)
        other = finalize(shard_of(tmp_path, 2, 3), settings, name="other")
        before = finalize(old_source, settings)
        ready = complete(new_source, settings)
        deadly = replace(settings, parts=replace(settings.parts, storage=KilledStorage()))
        KilledStorage.left = number
        try:
            finalize_shard(ready, deadly, before)
            ended = True
        except Killed:
            ended = False
        commit = Commit.parse(STORAGE.read(commit_url(str(output), "s")), "s")
        whole = [part for part in (*commit.parts, commit.rejects_part) if part is not None]
        for part in whole:
            data = (output / part.path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == part.sha256
        states.append(generation_of(commit))
        stock = take_stock(str(output), ["other", "s"], STORAGE)
        assert stock.committed == {"other", "s"}
        STORAGE.remove(*(f"{output}/{name}" for name in stock.strays))
        kept = {*objects_of(commit), *objects_of(other), "commits/s.json", "commits/other.json"}
        assert published(output) == kept
        if ended:
            break
    else:
        raise AssertionError("never whole")
    assert states == sorted(states)
    assert states.count(1) > 3
    assert states.count(2) > 3


def test_a_task_that_died_after_its_commit_is_not_done_again(tmp_path: Path) -> None:
    """Ray repeats it: the parts are gone, the commit is new, and old objects may still be there."""
    output = tmp_path / "out"
    settings = settings_of(output)
    before = finalize(shard_of(tmp_path, 5, 1), settings)
    old = {path: (output / path).read_bytes() for path in objects_of(before)}
    ready = complete(shard_of(tmp_path, 4, 2), settings)
    replaced = before.model_dump_json()
    done = finalize_stage(ready, settings, replaced)
    for path, data in old.items():
        (output / path).write_bytes(data)
    assert finalize_stage(ready, settings, replaced) == done
    assert published(output) == {"embeddings/s.g00002.parquet", "commits/s.json"}


def test_parts_that_are_gone_do_not_make_the_old_commit_the_new_one(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "out")
    before = finalize(shard_of(tmp_path, 5, 1), settings)
    ready = complete(shard_of(tmp_path, 4, 2), settings)
    STORAGE.remove(settings.parts.folder)
    with pytest.raises(FileNotFoundError):
        finalize_stage(ready, settings, before.model_dump_json())
    assert STORAGE.read(commit_url(settings.parts.output, "s")) == before.dump()


@pytest.fixture
def stocked(tmp_path: Path) -> tuple[Path, dict[str, Commit]]:
    """Shards of the first generation, and `b` of the second."""
    settings = settings_of(tmp_path)
    commits = {name: finalize(shard_of(tmp_path, 2), settings, name=name) for name in "abc"}
    commits["b"] = finalize(shard_of(tmp_path, 3, 1), settings, commits["b"], name="b")
    return tmp_path, commits


def test_one_generation_a_shard_needs_no_look_at_commits(
    stocked: tuple[Path, dict[str, Commit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = stocked
    monkeypatch.setattr(Storage, "read", refuse("a commit was read"))
    monkeypatch.setattr(Storage, "exists", refuse("a commit was looked up"))
    stock = take_stock(str(output), ["a", "b", "c"], STORAGE)
    assert (stock.committed, stock.strays) == ({"a", "b", "c"}, [])


def refuse(reason: str) -> Callable[..., bytes]:
    def fail(*_: object) -> bytes:
        raise AssertionError(reason)

    return fail


def test_only_commits_of_mixed_generations_are_read(
    stocked: tuple[Path, dict[str, Commit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = stocked
    for stray in ("embeddings/b.parquet", "embeddings/c.g00002-00000.parquet"):
        (output / stray).write_bytes(b"x")
    read: list[str] = []
    real = Storage.read

    def watch(self: Storage, url: str, crc32: int | None = None) -> bytes:
        read.append(url.rpartition("/")[2])
        return real(self, url, crc32)

    monkeypatch.setattr(Storage, "read", watch)
    stock = take_stock(str(output), ["a", "b", "c"], STORAGE)
    assert stock.strays == ["embeddings/b.parquet", "embeddings/c.g00002-00000.parquet"]
    assert sorted(read) == ["b.json", "c.json"]


def test_a_shard_that_lies_there_cut_and_whole_loses_what_its_commit_does_not_name(
    stocked: tuple[Path, dict[str, Commit]],
) -> None:
    """A task of a dead run published it under another `target_part_bytes`, and came late."""
    output, _ = stocked
    for stray in ("embeddings/a-00000.parquet", "embeddings/a-00001.parquet"):
        (output / stray).write_bytes(b"x")
    stock = take_stock(str(output), ["a", "b", "c"], STORAGE)
    assert stock.strays == ["embeddings/a-00000.parquet", "embeddings/a-00001.parquet"]
    assert stock.committed == {"a", "b", "c"}


def test_a_commit_without_its_objects_is_none(
    stocked: tuple[Path, dict[str, Commit]], caplog: pytest.LogCaptureFixture
) -> None:
    output, _ = stocked
    (output / "embeddings/c.parquet").unlink()
    assert take_stock(str(output), ["a", "b", "c"], STORAGE).committed == {"a", "b"}
    assert "shard c is committed, and embeddings/c.parquet is not there" in caplog.text


def test_an_object_that_another_shard_owns_is_no_stray(
    stocked: tuple[Path, dict[str, Commit]],
) -> None:
    """INPUT with both is refused; a shard that has vanished from INPUT may still be committed."""
    output, _ = stocked
    finalize(shard_of(output, 2), settings_of(output), name="a.g00002")
    stock = take_stock(str(output), ["a", "b", "c"], STORAGE)
    assert stock.strays == []
