"""What readers get: committed shards, each as one commit has it, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from pipeline import read
from pipeline.commits import COMMITS, Commit, Dataset, commit_url
from pipeline.joined import joined
from pipeline.one_vector import VECTOR_CHOICES, VectorChoice
from pipeline.sources import WORTH_A_LISTING
from pipeline.storage import Storage
from pipeline.torch_dataset import JoinedDataset
from pipeline.versions import switch, version_folder
from tests.s3 import S3Server
from tests.stages import STORAGE
from tests.vector_outputs import (
    Switching,
    clustered,
    drop_shard,
    put_shard,
    sweep,
    vector_dataset,
)

WIDTH = 12
COUNTS = [1, 3, 5, 2, 1, 4, 1, 13, 2, 3]  # tiles of each picture, thumbnails among them
OLD, NEW = "old of", "new of"
DATASET = vector_dataset({"cls": WIDTH, "mean": WIDTH})


def values(seed: int, num: int = sum(COUNTS)) -> dict[str, np.ndarray]:
    return {"cls": clustered(num, WIDTH, seed), "mean": clustered(num, WIDTH, seed + 100)}


def put(output: str, name: str, seed: int, storage: Storage = STORAGE, **options: Any) -> Commit:
    options = {"num_parts": 3, "word": OLD, "tile_counts": COUNTS, **options}
    return put_shard(output, DATASET, name, values(seed), storage, **options)


@pytest.fixture(params=["local", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: Callable[[str], S3Server]
) -> tuple[str, Storage]:
    """An OUTPUT to be, and the storage it is on."""
    if request.param == "local":
        return str(tmp_path / "out"), STORAGE
    server = s3_server("moto")
    return f"{server.make_bucket(f'read-{uuid4().hex}')}/out", Storage(server.options)


def test_pictures_have_their_tiles_together(place: tuple[str, Storage]) -> None:
    output, storage = place
    put(output, "b/a", 1, storage)
    put(output, "a", 2, storage, num_parts=1, group_rows=4)  # pictures go over row groups
    found = list(read.pictures(output, storage))
    assert [p.shard for p in found] == ["a"] * len(COUNTS) + ["b/a"] * len(COUNTS)
    for shard, seed in (("a", 2), ("b/a", 1)):
        mine = [p for p in found if p.shard == shard]
        assert [p.sample_index for p in mine] == list(range(len(COUNTS)))
        assert [len(p.is_thumbnail) for p in mine] == COUNTS
        assert [p.is_thumbnail.nonzero()[0].tolist() for p in mine] == [
            [count - 1] if count > 1 else [] for count in COUNTS
        ]
        for name, expected in values(seed).items():
            got = np.concatenate([p.features[name] for p in mine])
            assert got.dtype == np.float16
            np.testing.assert_array_equal(got, expected.astype(np.float16))
        assert mine[3].carried == {"txt": f"old of {shard}-00003"}
        assert mine[3].tile_boxes.tolist() == [[0, 0, 448, 448]] * 2


def test_features_and_shards_by_choice(tmp_path: Path) -> None:
    output = str(tmp_path)
    for name in ("a", "b", "c"):
        put(output, name, 1)
    found = list(read.pictures(output, shards=["c", "a"], features=["mean"]))
    assert [p.shard for p in found] == ["c"] * len(COUNTS) + ["a"] * len(COUNTS)
    assert list(found[0].features) == ["mean"]
    with pytest.raises(UserError, match="no feature tokens; it has cls, mean"):
        next(read.pictures(output, features=["tokens"]))


@pytest.mark.parametrize("group_rows", [1, 4, 7, 100])
def test_one_vector_a_picture(tmp_path: Path, group_rows: int) -> None:
    output = str(tmp_path)
    put(output, "a", 1, group_rows=group_rows)
    ends = np.cumsum(COUNTS)
    stored = values(1)["cls"].astype(np.float16).astype(np.float32)
    pictures = np.split(stored, ends[:-1])
    expected = {
        "thumbnail": [tiles[-1] for tiles in pictures],
        "first": [tiles[0] for tiles in pictures],
        "mean": [tiles.astype(np.float64).mean(axis=0) for tiles in pictures],
    }
    for choice in VECTOR_CHOICES:
        runs = list(read.vectors(output, "cls", choice, carried=["txt"]))
        assert all(run.values.dtype == np.float32 and run.values.flags.writeable for run in runs)
        got = np.concatenate([run.values for run in runs])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[choice], rtol=1e-5, atol=1e-6)
        rows = [row for run in runs for row in run.pictures.to_pylist()]
        assert rows[7] == {"key": "a-00007", "sample_index": 7, "txt": "old of a-00007"}
        assert len(rows) == len(COUNTS)


@pytest.mark.parametrize("choice", VECTOR_CHOICES)
def test_vectors_may_be_changed_where_they_are_as_they_are_stored(
    tmp_path: Path, choice: VectorChoice
) -> None:
    """float32, and every picture is one tile: nothing has to be converted or chosen."""
    dataset = vector_dataset({"cls": WIDTH}, embedding_dtype="float32")
    stored = clustered(5, WIDTH, 0)
    put_shard(str(tmp_path), dataset, "a", {"cls": stored}, STORAGE)
    for _ in range(2):
        (run,) = read.vectors(str(tmp_path), "cls", choice)
        np.testing.assert_array_equal(run.values, stored.astype(np.float32))
        run.values[:] = 0


def test_without_thumbnails_another_choice_is_needed(tmp_path: Path) -> None:
    output = str(tmp_path)
    dataset = vector_dataset({"cls": WIDTH}, thumbnail=False)
    put_shard(output, dataset, "a", {"cls": clustered(4, WIDTH, 0)}, STORAGE)
    with pytest.raises(UserError, match="not made with `thumbnail: true`; choose `mean` or"):
        next(read.vectors(output, "cls"))
    assert len(next(read.vectors(output, "cls", "first")).values) == 4


def test_vectors_say_what_is_not_there(tmp_path: Path) -> None:
    output = str(tmp_path)
    put(output, "a", 1)
    with pytest.raises(UserError, match="no vector bogus; choose one of thumbnail, mean, first"):
        read.vectors(output, "cls", "bogus")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no column nope; it has key, .*, txt"):
        read.vectors(output, "cls", carried=["txt", "nope"])


def test_an_output_that_does_not_tell_of_thumbnails_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path)
    put(output, "a", 1)
    settings = {name: v for name, v in DATASET.settings.items() if name != "thumbnail"}
    silent = DATASET.model_copy(update={"settings": settings})
    STORAGE.publish_bytes(f"{output}/dataset.json", silent.dump())
    with pytest.raises(UserError, match="not made with `thumbnail: true`; choose `mean` or"):
        read.vectors(output, "cls")
    assert len(list(read.vectors(output, "cls", "first"))) > 0


def test_pyarrow_and_duckdb_read_what_commits_name(place: tuple[str, Storage]) -> None:
    output, storage = place
    old = put(output, "a", 1, storage)
    put(output, "b", 2, storage)
    put(output, "a", 3, storage, before=old, word=NEW)  # the old objects still lie there
    storage.publish_bytes(f"{output}/embeddings/c.parquet", b"left by a run that died")
    rows = read.dataset(output, storage)
    table = rows.to_table(columns=["key", "sample_index", "txt", "cls"])
    assert table.num_rows == 2 * sum(COUNTS)
    assert table["txt"].unique().to_pylist() == [
        *(f"new of a-{n:05d}" for n in range(len(COUNTS))),
        *(f"old of b-{n:05d}" for n in range(len(COUNTS))),
    ]
    expected = np.concatenate([values(3)["cls"], values(2)["cls"]]).astype(np.float16)
    got = table["cls"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
    np.testing.assert_array_equal(got, expected)
    if storage is STORAGE:  # its own reader: Arrow's float16 it does not know
        there = duckdb.read_parquet(rows.files).aggregate("count(distinct (key, sample_index))")
        assert there.fetchall() == [(2 * len(COUNTS),)]


def test_an_output_without_commits_is_empty(tmp_path: Path) -> None:
    output = str(tmp_path)
    drop_shard(output, put(output, "a", 1), STORAGE)
    assert read.committed(output) == []
    assert list(read.pictures(output)) == []
    assert read.dataset(output).to_table().num_rows == 0
    with pytest.raises(UserError, match="is it an OUTPUT of `extract`"):
        next(read.pictures(f"{output}/nowhere"))


def test_the_current_version_is_read(tmp_path: Path) -> None:
    output = str(tmp_path)
    put(output, "a", 1)
    other = vector_dataset({"cls": WIDTH}, tiling="center-crop")
    version = other.fingerprint[:12]
    folder = version_folder(output, version)
    put_shard(folder, other, "z", {"cls": clustered(3, WIDTH, 0)}, STORAGE)
    assert read.committed(output) == ["a"]
    switch(output, version, other, STORAGE)
    assert read.committed(output) == ["z"]
    assert [p.key for p in read.pictures(output)] == [f"z-{n:05d}" for n in range(3)]


READERS: dict[str, Callable[..., Any]] = {
    "pictures": read.pictures,
    "vectors": lambda output, storage: read.vectors(output, "cls", "first", storage),
    "dataset": lambda output, storage: read.dataset(output, storage).to_table()["key"].to_pylist(),
    "joined": joined,
    "torch": lambda output, storage: JoinedDataset(output, storage)._shards,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_switch_meanwhile_pairs_no_folder_with_shards_of_another(
    tmp_path: Path, reader: str
) -> None:
    output = str(tmp_path)
    put(output, "a", 1)
    other = vector_dataset({"cls": WIDTH}, tiling="center-crop")
    version = other.fingerprint[:12]
    put_shard(version_folder(output, version), other, "z", {"cls": clustered(3, WIDTH, 0)}, STORAGE)
    switching = Switching(lambda: switch(output, version, other, STORAGE))
    if reader == "joined":
        with pytest.raises(UserError, match=r"cannot read in/a\.tar"):
            next(READERS[reader](output, switching))
    else:
        assert len(list(READERS[reader](output, switching))) > 0
    assert read.open_output(output).version == version


@pytest.mark.parametrize("reader", READERS)
def test_a_snapshot_is_of_the_call(tmp_path: Path, reader: str) -> None:
    """What is wrong is said then, not at the first picture; and what comes later is not in it."""
    output = str(tmp_path)
    with pytest.raises(UserError, match="is it an OUTPUT of `extract`"):
        READERS[reader](output, STORAGE)
    if reader in ("pictures", "vectors"):
        put(output, "a", 1)
        found = READERS[reader](output, STORAGE)
        put(output, "b", 2)
        assert {each.shard for each in found} == {"a"}


def words(pictures: Iterator[read.Picture]) -> list[str]:
    return [str(p.carried["txt"]).partition(" of ")[0] for p in pictures]


@pytest.mark.parametrize("at", range(0, len(COUNTS), 3))
def test_a_shard_replaced_while_it_is_read_comes_out_whole(
    place: tuple[str, Storage], at: int
) -> None:
    output, storage = place
    old = put(output, "a", 1, storage)
    reader = read.pictures(output, storage)
    found = [next(reader) for _ in range(at + 1)]
    put(output, "a", 2, storage, before=old, word=NEW)
    sweep(output, old, storage)
    found += reader
    assert words(iter(found)) == ["old"] * len(COUNTS)
    got = np.concatenate([p.features["cls"] for p in found])
    np.testing.assert_array_equal(got, values(1)["cls"].astype(np.float16))
    assert words(read.pictures(output, storage)) == ["new"] * len(COUNTS)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("reader", [read.pictures, joined, JoinedDataset])
def test_a_shard_that_was_named_must_be_there(
    place: tuple[str, Storage], reader: Callable[..., Any], many: bool
) -> None:
    output, storage = place
    put(output, "b/a", 1, storage)
    named = ["b/a"] * (WORTH_A_LISTING if many else 1)
    reader(output, storage, shards=named)
    for wrong in ("x", "b", "b/a.json"):
        with pytest.raises(UserError, match=f"shard {wrong} is not committed; check its name"):
            reader(output, storage, shards=[*named, wrong])


def test_a_shard_that_was_named_may_vanish_meanwhile(tmp_path: Path) -> None:
    output = str(tmp_path)
    old = put(output, "a", 1)
    put(output, "b", 2)
    found = read.pictures(output, shards=["a", "b"])
    drop_shard(output, old, STORAGE)
    assert {p.shard for p in found} == {"b"}


def test_an_output_that_vanishes_is_no_empty_one(place: tuple[str, Storage]) -> None:
    output, storage = place
    put(output, "a", 1, storage)
    readers: list[Iterator[Any]] = [
        read.pictures(output, storage),
        read.vectors(output, "cls", "first", storage),
        joined(output, storage),
        iter(JoinedDataset(output, storage)),
    ]
    storage.remove(output)
    for reader in readers:
        with pytest.raises(UserError, match=r"out: no dataset\.json there any more"):
            next(reader)


class Meanwhile(Storage):
    """Does something once, right after a commit was read."""

    def __init__(self, storage: Storage, act: Callable[[], object]) -> None:
        super().__init__(storage.options)
        self._act: Callable[[], object] | None = act

    def read(self, url: str, crc32: int | None = None) -> bytes:
        data = super().read(url, crc32)
        if f"/{COMMITS}/" in url and self._act is not None:
            act, self._act = self._act, None
            act()
        return data


def test_a_shard_replaced_as_it_is_opened_comes_out_new(place: tuple[str, Storage]) -> None:
    output, storage = place
    old = put(output, "a", 1, storage)

    def replace() -> None:
        put(output, "a", 2, storage, before=old, word=NEW)
        sweep(output, old, storage)

    found = list(read.pictures(output, Meanwhile(storage, replace)))
    assert words(iter(found)) == ["new"] * len(COUNTS)


def test_a_shard_pruned_as_it_is_opened_vanishes(place: tuple[str, Storage]) -> None:
    output, storage = place
    old = put(output, "a", 1, storage)
    put(output, "b", 2, storage)
    meanwhile = Meanwhile(storage, lambda: drop_shard(output, old, storage))
    assert {p.shard for p in read.pictures(output, meanwhile)} == {"b"}


def test_a_dataset_goes_on_where_a_shard_is_pruned_meanwhile(place: tuple[str, Storage]) -> None:
    output, storage = place
    put(output, "b", 2, storage)
    old = put(output, "a", 1, storage)

    class Pruning(Storage):
        """Removes the shard once it has been listed."""

        def iter_files(self, folder: str, depth: int | None = None) -> Iterator[str]:
            yield from super().iter_files(folder, depth)
            drop_shard(output, old, storage)

    found = read.dataset(output, Pruning(storage.options)).to_table()
    assert {key[0] for key in found["key"].to_pylist()} == {"b"}


def test_a_shard_pruned_and_computed_again_under_the_same_names(
    place: tuple[str, Storage],
) -> None:
    output, storage = place
    old = put(output, "a", 1, storage)

    def again() -> None:
        drop_shard(output, old, storage)
        new = put(output, "a", 2, storage, word="another word for")
        assert [part.path for part in new.parts] == [part.path for part in old.parts]

    found = list(read.pictures(output, Meanwhile(storage, again)))
    assert {p.carried["txt"] for p in found} == {
        f"another word for a-{n:05d}" for n in range(len(COUNTS))
    }


def test_a_part_of_another_size_is_told_at_once(place: tuple[str, Storage]) -> None:
    output, storage = place
    commit = put(output, "a", 1, storage)
    part = commit.parts[1]
    url = f"{output}/{part.path}"
    data = storage.read(url)
    counting = CountingRanges(storage)
    for changed in (data[:-1], data + b"x"):
        storage.publish_bytes(url, changed)
        says = f"a-00001.parquet: {len(changed)} bytes, the commit says {part.bytes}; see `tess"
        with pytest.raises(UserError, match=re.escape(says)):
            list(read.pictures(output, counting))
    assert part.path not in counting.paths


def test_more_files_than_may_be_open_are_told(tmp_path: Path) -> None:
    output = str(tmp_path)
    commit = put(output, "a", 1, num_parts=10)
    size = sum(part.bytes for part in commit.parts)
    reader = read.pictures(output)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(int(path.name) for path in Path("/dev/fd").iterdir())
    fillers = [os.dup(0) for _ in range(last)]  # no number below is left free
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 6, hard))
    try:
        with pytest.raises(
            UserError, match=rf"shard a: its 10 objects \({size:,} bytes\) .*ulimit"
        ):
            next(reader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    assert len(list(read.pictures(output))) == len(COUNTS)


class FullDisk(Storage):
    def read_range(self, url: str, start: int, end: int, *how: Any, **named: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_temporary_folder_is_told(s3_server: Callable[[str], S3Server]) -> None:
    server = s3_server("moto")
    output = f"{server.make_bucket(f'read-{uuid4().hex}')}/out"
    put(output, "a", 1, Storage(server.options))
    with pytest.raises(UserError, match=r"no space left in /.*; set TMPDIR to a larger disk"):
        next(read.pictures(output, FullDisk(server.options)))


class CountingRanges(Storage):
    """The objects that ranges were read of, below OUTPUT."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.options)
        self.paths: set[str] = set()

    def read_range(self, url: str, start: int, end: int, *how: Any, **named: Any) -> bytes:
        self.paths.add(url.partition("/out/")[2])
        return super().read_range(url, start, end, *how, **named)


@pytest.mark.parametrize(
    "path",
    [
        "../elsewhere.parquet",
        "embeddings/../../elsewhere.parquet",
        "embeddings/b.parquet",
        "rejects/../embeddings/b.parquet",
    ],
)
def test_a_commit_that_names_what_is_not_its_own_is_refused(
    place: tuple[str, Storage], path: str
) -> None:
    output, storage = place
    commit = put(output, "a", 1, storage, num_parts=1)
    put(output, "b", 2, storage, num_parts=1)
    data = storage.read(f"{output}/{commit.parts[0].path}")
    storage.publish_bytes(f"{output}/../elsewhere.parquet", data)
    edited = commit.parts[0].model_copy(update={"path": path})
    strange = commit.model_copy(update={"parts": (edited,)})
    storage.publish_bytes(commit_url(output, "a"), strange.dump())
    says = rf"commits/a\.json: names {re.escape(path)}, no part of its shard"
    with pytest.raises(UserError, match=says):
        list(read.pictures(output, storage))
    with pytest.raises(UserError, match=says):
        read.dataset(output, storage)


def test_a_dataset_never_mixes(tmp_path: Path) -> None:
    output = str(tmp_path)
    old = put(output, "a", 1)
    rows = read.dataset(output)
    put(output, "a", 2, before=old, word=NEW)
    sweep(output, old, STORAGE)
    with pytest.raises(FileNotFoundError):
        rows.to_table()
    assert read.dataset(output).to_table().num_rows == sum(COUNTS)


def test_what_is_missing_or_damaged_is_named(place: tuple[str, Storage]) -> None:
    output, storage = place
    commit = put(output, "a", 1, storage)
    second = f"{output}/{commit.parts[1].path}"
    data = storage.read(second)
    storage.remove_objects(second)
    with pytest.raises(UserError, match=r"a-00001\.parquet: missing; see `tessera verify`"):
        list(read.pictures(output, storage))
    storage.publish_bytes(second, data[:-9] + b"x" * 9)
    with pytest.raises(UserError, match=r"a-00001\.parquet: .*(sha256 differs|cannot be read)"):
        list(read.pictures(output, storage))


def test_parts_are_what_pyarrow_reads_itself(made: Path) -> None:
    """The output of the stages themselves, not of the tests."""
    output = str(made / "out")
    table = pq.read_table(made / "out/embeddings/a.parquet")
    found = list(read.pictures(output, shards=["a"]))
    assert [p.key for p in found for _ in p.is_thumbnail] == table["key"].to_pylist()
    stored = table["mean"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    np.testing.assert_array_equal(np.concatenate([p.features["mean"] for p in found]), stored)
    assert found[1].carried == {"txt": "caption 0001", "json:url": "u/0001", "json:none": None}
    assert isinstance(read.open_output(output).dataset, Dataset)
