"""A shard that is published again gets new names, and a kill anywhere leaves readers one of two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from pipeline.audit import commit_problems
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, Dataset, Format, commit_url
from pipeline.embedding import part_folder
from pipeline.generations import (
    Owner,
    colliding,
    generation_of,
    objects_of,
    owners,
    part_paths,
    rejects_path,
)
from pipeline.layout import Layout
from pipeline.ledger import CompleteShard
from pipeline.records import Shape, Shard
from pipeline.replaced import ReplacedMeanwhileError, mark_of
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
        ("a/b", [Owner("a/b", 1)]),
        ("a-00001", [Owner("a-00001", 1), Owner("a", 1, True)]),
        ("a.g00002", [Owner("a.g00002", 1), Owner("a", 2)]),
        (
            "a.g00012-00000",
            [Owner("a.g00012-00000", 1), Owner("a.g00012", 1, True), Owner("a", 12, True)],
        ),
        ("a.g00001", [Owner("a.g00001", 1)]),  # the first has no number
        ("a-00007.g00003", [Owner("a-00007.g00003", 1), Owner("a-00007", 3)]),
    ],
)
def test_whose_an_object_may_be(name: str, expected: list[Owner]) -> None:
    assert owners(f"embeddings/{name}.parquet", "parquet") == expected
    assert owners(f"embeddings/{name}.tar", "webdataset") == expected
    assert owners(f"rejects/{name}.parquet", "npy") == expected
    assert owners(f"commits/{name}.json", "parquet") == []


def layout(format_: Format, *features: str) -> Layout:
    return Layout(format_, dict.fromkeys(features or ("cls",), 6), "float16", ())


@pytest.mark.parametrize("shard", ["a", "x/a-00007", "a.g00002", "a.b", "x~2F/~y.z"])
@pytest.mark.parametrize("generation", [1, 2, 99999])
@pytest.mark.parametrize("format_", ["parquet", "webdataset", "npy"])
def test_names_are_read_back(shard: str, generation: int, format_: Format) -> None:
    for count in (1, 3):
        parts = part_paths(shard, generation, count, layout(format_, "cls", "mean"))
        paths = [*(path for part in parts for path in part), rejects_path(shard, generation)]
        assert len(set(paths)) == count * (3 if format_ == "npy" else 1) + 1
        for path in paths[:-1]:
            assert Owner(shard, generation, count > 1) in owners(path, format_), path
        assert Owner(shard, generation) in owners(paths[-1], format_)


def test_names_of_arrays_and_tables() -> None:
    assert part_paths("x/a.b", 1, 1, layout("npy")) == [
        ["embeddings/img_emb/img_emb_x~2Fa~2Eb.npy",
         "embeddings/metadata/metadata_x~2Fa~2Eb.parquet"],
    ]  # fmt: skip
    assert part_paths("a", 3, 2, layout("npy", "mean", "cls"))[1] == [
        "embeddings/mean/img_emb_a.g00003-00001.npy",
        "embeddings/cls/img_emb_a.g00003-00001.npy",
        "embeddings/metadata/metadata_a.g00003-00001.parquet",
    ]


@pytest.mark.parametrize(
    "name",
    ["embeddings/img_emb_a.npy", "embeddings/x/img_emb_a.parquet", "embeddings/x/y/img_emb_a.npy",
     "embeddings/metadata/metadata_a.npy", "embeddings/a.parquet", "embeddings/x/a.npy"],
)  # fmt: skip
def test_what_is_no_array_or_table_is_nobodys(name: str) -> None:
    assert owners(name, "npy") == []


SHARDS = st.lists(
    st.text(st.sampled_from("ab.-/~go0"), min_size=1, max_size=6).filter(
        lambda name: all(part not in ("", ".", "..") for part in name.split("/"))
    ),
    min_size=1, max_size=30, unique=True,
)  # fmt: skip


@given(SHARDS, st.data())
def test_arrays_and_tables_pair_by_position(shards: list[str], data: st.DataObject) -> None:
    """As embedding-reader and clip-retrieval list them: each folder alone, sorted by name."""
    every = []
    for shard in shards:
        generation = data.draw(st.sampled_from([1, 2, 10]))
        every += part_paths(shard, generation, data.draw(st.sampled_from([1, 2])), layout("npy"))
    order = sorted(every, key=lambda paths: paths[0])
    assert [path for _, path in order] == sorted(path for _, path in every)
    assert len({path for part in every for path in part}) == 2 * len(every)


def test_colliding_names() -> None:
    assert colliding(["a", "b", "a-0001", "a.g2", "a.g00001"]) is None
    assert colliding(["a-00000", "a-00001", "a.g00002"]) is None
    assert colliding(["a-00001", "a"]) == ("a", "a-00001")
    assert colliding(["a.g00002", "a"]) == ("a", "a.g00002")
    assert colliding(["a.g00002-00000", "a"]) == ("a", "a.g00002-00000")
    for name in ("a.json/b", "a.parquet/b/c", "a.tar/b", "a.g00002.parquet/b"):
        assert colliding(["a", name, "b"]) == ("a", name)
        assert colliding([name, "b"]) is None
    with pytest.raises(UserError, match=r"names a and a\.g00002 collide"):
        list_shards(["/d/a.tar", "/d/a.g00002.tar"], STORAGE)


def shard_of(folder: Path, count: int, seed: int = 0, bad: bool = False) -> Path:
    members = samples(count, seed)
    if bad:
        members[0] = (members[0][0], b"no picture")
    return write_tar(folder / f"{seed}.tar", members)


def settings_of(
    output: Path, target_part_bytes: int = 1 << 30, format_: Format = "parquet"
) -> FinalizeSettings:
    features: dict[str, Shape] = {"cls": 6, "mean": 6}
    parts = part_settings(output, features if format_ == "npy" else None, format=format_)
    return FinalizeSettings(parts, FINGERPRINT, target_part_bytes)


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
    assert [[p.path] for p in first.parts] == part_paths(
        "s", 1, len(first.parts), layout("parquet")
    )
    assert (generation_of(first), len(first.parts) > 1) == (1, True)
    second = finalize(shard_of(tmp_path, 6, 2, bad=True), small, first)
    assert [[p.path] for p in second.parts] == part_paths(
        "s", 2, len(second.parts), layout("parquet")
    )
    assert second.rejects_part is not None
    assert second.rejects_part.path == "rejects/s.g00002.parquet"
    assert len(second.parts) > 1
    assert published(output) == {*objects_of(second), "commits/s.json"}
    third = finalize(shard_of(tmp_path, 3, 3), settings_of(output), second)
    assert published(output) == {"embeddings/s.g00003.parquet", "commits/s.json"}
    assert generation_of(third) == 3
    for commit in (first, second, third):
        settings = {"embedding_dtype": "float16", "carry": []}
        made = Dataset.describe("m", None, "w", settings, {"cls": 6}, "0").model_copy(
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


@pytest.mark.parametrize("format_", ["parquet", "npy"])
def test_a_kill_anywhere_leaves_the_old_or_the_new_whole(format_: Format, tmp_path: Path) -> None:
    """Between any two changes of the storage; the next run removes what no commit names."""
    old_source, new_source = shard_of(tmp_path, 8, 1, bad=True), shard_of(tmp_path, 7, 2, bad=True)
    states = []
    for number in range(80):
        output = tmp_path / f"out-{number}"
        settings = settings_of(output, 1 << 30 if format_ == "npy" else 1000, format_)
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
        for thing in (thing for part in whole for thing in part.objects):
            data = (output / thing.path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == thing.sha256
        states.append(generation_of(commit))
        stock = take_stock(str(output), ["other", "s"], STORAGE, settings.parts.layout)
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


def test_a_task_that_is_killed_anywhere_is_brought_to_its_end_by_the_next_attempt(
    tmp_path: Path,
) -> None:
    """Nothing but the new commit and what it names is left; of the old one the mark is known."""
    old_source, new_source = shard_of(tmp_path, 8, 1, bad=True), shard_of(tmp_path, 7, 2, bad=True)
    for number in range(40):
        output = tmp_path / f"out-{number}"
        settings = settings_of(output, target_part_bytes=1000)
        others = [
            finalize(shard_of(tmp_path, 2, seed), settings, name=name)
            for seed, name in ((3, "other"), (4, "s/below"), (5, "s.g00001"))
        ]
        mark = mark_of(finalize(old_source, settings))
        ready = complete(new_source, settings)
        deadly = replace(settings, parts=replace(settings.parts, storage=KilledStorage()))
        KilledStorage.left = number
        try:
            finalize_stage(ready, deadly, mark)
            ended = True
        except Killed:
            ended = False
        commit = Commit.parse(finalize_stage(ready, settings, mark), "s")
        assert (generation_of(commit), commit.samples) == (2, 7)
        assert STORAGE.read(commit_url(str(output), "s")) == commit.dump()
        kept = {f"commits/{known.shard}.json" for known in [*others, commit]}
        assert published(output) == kept.union(*map(objects_of, [*others, commit]))
        left = f"{settings.parts.folder}/{part_folder('s')}"
        assert list(STORAGE.iter_files(left)) == []
        if ended:
            break
    else:
        raise AssertionError("never whole")


def test_a_commit_that_was_not_compared_fails_the_shard(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "out")
    mark = mark_of(finalize(shard_of(tmp_path, 5, 1), settings))
    ready = complete(shard_of(tmp_path, 4, 2), settings)
    another = finalize(shard_of(tmp_path, 3, 3), settings)
    with pytest.raises(ReplacedMeanwhileError, match="shard s: its commit is not the one that was"):
        finalize_stage(ready, settings, mark)
    assert STORAGE.read(commit_url(settings.parts.output, "s")) == another.dump()


def test_a_task_that_died_after_its_commit_is_not_done_again(tmp_path: Path) -> None:
    """Ray repeats it: the parts are gone, the commit is new, and old objects may still be there."""
    output = tmp_path / "out"
    settings = settings_of(output)
    before = finalize(shard_of(tmp_path, 5, 1), settings)
    old = {path: (output / path).read_bytes() for path in objects_of(before)}
    ready = complete(shard_of(tmp_path, 4, 2), settings)
    replaced = mark_of(before)
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
        finalize_stage(ready, settings, mark_of(before))
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


def test_a_commit_of_which_one_array_is_gone_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its shard is computed again; one of rejects alone, which has no table, is whole."""
    settings = settings_of(tmp_path, format_="npy")
    layout_ = settings.parts.layout
    for name in "ab":
        finalize(shard_of(tmp_path, 2), settings, name=name)
    nothing = write_tar(tmp_path / "nothing.tar", [("0.jpg", b"x")])
    commit = finalize(nothing, settings, name="c")
    assert len(commit.parts[0].objects) == 2
    whole = take_stock(str(tmp_path), ["a", "b", "c"], STORAGE, layout_)
    assert (whole.committed, whole.strays) == ({"a", "b", "c"}, [])
    assert not caplog.text
    (tmp_path / "embeddings/mean/img_emb_a.npy").unlink()
    assert take_stock(str(tmp_path), ["a", "b", "c"], STORAGE, layout_).committed == {"b", "c"}
    assert "shard a is committed, and embeddings/mean/img_emb_a.npy is not there" in caplog.text
