"""An index of a small OUTPUT: what it finds, what a change of OUTPUT costs, what it says no to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import pytest

from benchmarks.bookkeeping import a_commit
from jobs import cli
from jobs import index as index_job
from jobs.index import build_index, look
from jobs.index_choice import Asked
from jobs.index_outcome import Estimate, Indexed
from jobs.show_index import show_estimate
from jobs.terminal import BrokenRunError
from jobs.verify_index import _differences
from model.errors import UserError
from pipeline import index_kinds
from pipeline.commits import RUNS, Commit, PartFile, PublishedObject, commit_url
from pipeline.index_record import (
    KINDS,
    RECORD,
    Flat,
    IndexRecord,
    Kind,
    commit_digest,
    read_record,
)
from pipeline.lease import held
from pipeline.one_vector import VECTOR_CHOICES, VectorChoice
from pipeline.read import vectors
from pipeline.storage import Storage
from pipeline.unit_vectors import normalized
from pipeline.vector_index import Neighbor, VectorIndex
from pipeline.versions import switch, version_folder
from tests.builders import REPOSITORY, files_below, run_cli
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

WIDTH = 48
PICTURES = 150  # of a shard
DATASET = vector_dataset({"cls": WIDTH, "mean": WIDTH})


class Book:
    """An OUTPUT whose shards come and go, and an INDEX of it."""

    def __init__(self, root: str, storage: Storage = STORAGE) -> None:
        self.output, self.index, self.storage = f"{root}/out", f"{root}/index", storage
        self.commits: dict[str, Commit] = {}
        self.vectors: dict[str, np.ndarray] = {}  # unit length, as stored

    def put(self, name: str, seed: int, pictures: int = PICTURES) -> None:
        values = {"cls": clustered(pictures, WIDTH, seed), "mean": clustered(pictures, WIDTH, 99)}
        before = self.commits.get(name)
        self.commits[name] = put_shard(
            self.output, DATASET, name, values, self.storage, before=before, group_rows=64
        )
        if before is not None:
            sweep(self.output, before, self.storage)
        self.vectors[name] = normalized(values["cls"].astype(np.float16))

    def drop(self, name: str) -> None:
        drop_shard(self.output, self.commits.pop(name), self.storage)
        del self.vectors[name]

    def bring_up_to_date(self, **options: Any) -> Indexed:
        return build_index(self.output, self.index, storage_options=self.storage.options, **options)

    def opened(self) -> VectorIndex:
        return VectorIndex.open(self.index, self.storage)

    def exact(self, query: np.ndarray, count: int) -> list[tuple[str, int]]:
        places = [(name, n) for name, values in self.vectors.items() for n in range(len(values))]
        found = np.concatenate(list(self.vectors.values())) @ query
        return [places[at] for at in np.argsort(-found)[:count]]


@pytest.fixture
def book(tmp_path: Path) -> Book:
    made = Book(str(tmp_path))
    for seed, name in enumerate(["a", "b", "c/d"]):
        made.put(name, seed)
    return made


def places(neighbors: list[Neighbor]) -> list[tuple[str, int]]:
    return [(neighbor.shard, neighbor.sample_index) for neighbor in neighbors]


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_finds_itself(book: Book, kind: Kind) -> None:
    book.bring_up_to_date(kind=kind)
    index = book.opened()
    assert (index.record.kind, index.record.live_vectors) == (kind, 3 * PICTURES)
    for name, values in book.vectors.items():
        for number, (first, *_) in enumerate(index.search(3 * values, 2)):
            assert (first.key, first.shard) == (f"{name}-{number:05d}", name)
            assert (first.sample_index, first.caption) == (number, f"caption of {first.key}")
            assert first.similarity == pytest.approx(1, abs=2e-3)


def test_a_switch_meanwhile_pairs_no_version_with_another_folder(book: Book) -> None:
    other = vector_dataset({"cls": WIDTH}, tiling="center-crop")
    version = other.fingerprint[:12]
    folder = version_folder(book.output, version)
    put_shard(folder, other, "z", {"cls": clustered(3, WIDTH, 0)}, STORAGE)
    book.bring_up_to_date()
    record = read_record(book.index, STORAGE)
    assert record is not None
    for reads in (
        lambda storage: look(book.output, book.index, Asked(), storage).choice.reasons,
        lambda storage: _differences(record, storage),
    ):
        switch(book.output, None, DATASET, STORAGE)
        assert not reads(Switching(lambda: switch(book.output, version, other, STORAGE)))
        assert reads(STORAGE)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_what_exact_search_says(book: Book, kind: Kind) -> None:
    record = book.bring_up_to_date(kind=kind).record
    assert record.recall is not None
    assert (record.recall.neighbors, record.recall.queries) == (10, 100)
    index, shares = book.opened(), []
    for name, values in book.vectors.items():
        for number, found in enumerate(index.search(values, 11)):
            me = (name, number)
            exact = [place for place in book.exact(values[number], 11) if place != me][:10]
            mine = [place for place in places(found) if place != me][:10]
            shares.append(len(set(exact) & set(mine)) / 10)
    assert record.recall.value == pytest.approx(np.mean(shares), abs=0.03)
    assert record.recall.value >= {"flat": 1.0, "hnsw": 0.97, "ivf-pq": 0.9}[kind]


@pytest.mark.parametrize("choice", VECTOR_CHOICES)
def test_the_vector_that_was_asked_for_is_indexed(
    made: Path, tmp_path: Path, choice: VectorChoice
) -> None:
    """On the output of the stages themselves: pictures of several tiles, a reject between."""
    output, index = str(made / "out"), str(tmp_path / "index")
    build_index(output, index, feature="mean", vector=choice)
    opened = VectorIndex.open(index, STORAGE)
    assert opened.record.caption == "txt"
    for run in vectors(output, "mean", choice, carried=["txt"]):
        rows = run.pictures.to_pylist()
        for row, (first, *_) in zip(rows, opened.search(run.values, 1), strict=True):
            assert (first.key, first.shard, first.caption) == (row["key"], run.shard, row["txt"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_of_a_key(book: Book, kind: Kind) -> None:
    book.put("e", seed=9)
    commit = book.commits["e"]
    book.commits["e"] = put_shard(
        book.output,
        DATASET,
        "e",
        {"cls": clustered(2, WIDTH, 9), "mean": clustered(2, WIDTH, 9)},
        STORAGE,
        keys=["a-00003", "own"],
        before=commit,
    )
    book.bring_up_to_date(kind=kind)
    index = book.opened()
    assert index.vector_of("b-00007") @ book.vectors["b"][7] == pytest.approx(1, abs=2e-3)
    assert index.vector_of("a-00003", "a") @ book.vectors["a"][3] == pytest.approx(1, abs=2e-3)
    with pytest.raises(UserError, match="key a-00003 is in shards a, e; say in which"):
        index.vector_of("a-00003")
    with pytest.raises(UserError, match="no picture with key own in shard a"):
        index.vector_of("own", "a")
    with pytest.raises(UserError, match=r"holds vectors of 48 values, not \[1, 3\]"):
        index.search(np.ones((1, 3)), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_changed_is_read_and_what_went_is_never_found(book: Book, kind: Kind) -> None:
    for seed, name in enumerate(["e", "f"], 30):
        book.put(name, seed)
    book.bring_up_to_date(kind=kind)
    before = {
        name: data
        for name, data in files_below(Path(book.index)).items()
        if name != RECORD and not name.endswith(".found.parquet")
    }
    for name in ("a", "c/d", "e", "f"):  # what is not changed cannot be read any more
        sweep(book.output, book.commits[name], STORAGE)
    old_b = book.vectors["b"]
    book.put("b", seed=50)
    book.put("new", seed=51)
    done = book.bring_up_to_date()
    assert (done.added, done.changed, done.removed) == (("new",), ("b",), ())
    assert done.estimate.vectors_to_read == 2 * PICTURES
    assert done.record.kind == kind
    assert done.record.live_vectors == 6 * PICTURES
    after = files_below(Path(book.index))
    assert {name: after[name] for name in before} == before
    drop_shard(book.output, book.commits["c/d"], STORAGE)
    gone = book.vectors.pop("c/d")
    done = book.bring_up_to_date()
    assert (done.added, done.changed, done.removed) == ((), (), ("c/d",))
    index = book.opened()
    assert index.record.live_vectors == 5 * PICTURES
    everything = {(name, n) for name in book.vectors for n in range(PICTURES)}
    for found in index.search(np.concatenate([gone, old_b])[::3], 6 * PICTURES):
        assert set(places(found)) <= everything
        assert kind != "flat" or set(places(found)) == everything
    for name, values in book.vectors.items():
        assert [places(f)[0] for f in index.search(values, 1)] == [
            (name, n) for n in range(PICTURES)
        ]
    with pytest.raises(UserError, match="no picture with key c/d-00000"):
        index.vector_of("c/d-00000")


def test_shards_without_pictures(tmp_path: Path) -> None:
    """All of them were rejected: there is an index, and nothing in it."""
    book = Book(str(tmp_path))
    book.put("a", 0, pictures=0)
    done = book.bring_up_to_date()
    assert (done.record.live_vectors, done.record.recall) == (0, None)
    assert book.opened().search(clustered(2, WIDTH, 0), 3) == [[], []]
    book.put("b", 1, pictures=1)
    assert book.bring_up_to_date().record.live_vectors == 1
    assert places(book.opened().search(clustered(1, WIDTH, 0), 3)[0]) == [("b", 0)]
    assert book.bring_up_to_date().was_up_to_date


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_when_the_last_shard_goes_nothing_is_found(book: Book, kind: Kind | None) -> None:
    before = book.bring_up_to_date(kind=kind).record
    for name in list(book.commits):
        book.drop(name)
    done = book.bring_up_to_date()
    assert done.removed == ("a", "b", "c/d")
    assert (done.record.kind, done.record.live_vectors, done.record.recall) == (
        before.kind,
        0,
        None,
    )
    assert book.opened().search(clustered(2, WIDTH, 0), 3) == [[], []]
    with pytest.raises(UserError, match="no picture with key a-00000"):
        book.opened().vector_of("a-00000")
    assert set(files_below(Path(book.index))) == own_files(done.record)
    assert book.bring_up_to_date().was_up_to_date
    book.put("a", 0)
    assert book.bring_up_to_date().record.live_vectors == PICTURES
    assert book.opened().record.kind == before.kind


def test_the_last_shard_of_a_kind_by_number(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(index_kinds.MOST_VECTORS, "flat", 0)
    monkeypatch.setitem(index_kinds.MOST_VECTORS, "hnsw", 100)
    assert book.bring_up_to_date().record.kind == "ivf-pq"
    for name in list(book.commits):
        book.drop(name)
    record = book.bring_up_to_date().record
    assert (record.kind, record.live_vectors, record.segments) == ("flat", 0, ())


def test_too_few_to_train(tmp_path: Path) -> None:
    book = Book(str(tmp_path))
    book.put("a", 0, pictures=15)
    with pytest.raises(UserError, match="ivf-pq is trained on at least 16 vectors, there are 15"):
        book.bring_up_to_date(kind="ivf-pq")
    book.put("b", 1, pictures=1)
    assert book.bring_up_to_date(kind="ivf-pq").record.live_vectors == 16


def test_a_caption_is_shortened(book: Book) -> None:
    values = {"cls": clustered(2, WIDTH, 0), "mean": clustered(2, WIDTH, 0)}
    put_shard(book.output, DATASET, "z", values, STORAGE, word="ä" * 600)
    book.bring_up_to_date()
    first = book.opened().search(values["cls"], 3)[0]
    assert [n.caption for n in first if n.shard == "z"] == ["ä" * 500] * len(
        [n for n in first if n.shard == "z"]
    )
    assert "z" in {n.shard for n in first}


def test_flat_search_over_segments_is_exact(book: Book) -> None:
    book.bring_up_to_date(kind="flat")
    book.put("e", seed=7, pictures=40)
    book.bring_up_to_date()
    book.drop("b")
    book.bring_up_to_date()
    index = book.opened()
    assert len(index.record.segments) == 2
    queries = clustered(20, WIDTH, 1234)
    for query, found in zip(queries, index.search(queries, 25), strict=True):
        assert places(found) == book.exact(normalized(query[np.newaxis])[0], 25)
        similarities = [neighbor.similarity for neighbor in found]
        assert similarities == sorted(similarities, reverse=True)


def test_a_run_with_nothing_to_do_writes_nothing(book: Book) -> None:
    book.bring_up_to_date()
    before = {p: p.stat().st_mtime_ns for p in Path(book.index).rglob("*") if p.is_file()}
    done = book.bring_up_to_date()
    assert done.was_up_to_date
    assert {p: p.stat().st_mtime_ns for p in Path(book.index).rglob("*") if p.is_file()} == before


def own_files(record: IndexRecord) -> set[str]:
    return {RECORD, *record.objects}


def test_a_dead_segment_goes_and_nothing_else_is_left(book: Book) -> None:
    first = book.bring_up_to_date().record
    for name in ("a", "b"):
        book.drop(name)
    left = Path(book.index) / "segments/left.faiss"
    left.write_bytes(b"by a run that died")
    record = book.bring_up_to_date().record
    assert record.segments[0].name != first.segments[0].name
    assert [shard.shard for shard in record.segments[0].shards] == ["c/d"]
    assert set(files_below(Path(book.index))) == own_files(record)


def test_the_record_says_which_commits_it_holds(book: Book) -> None:
    record = book.bring_up_to_date().record
    assert record == read_record(book.index, STORAGE)
    held_shards = [shard for segment in record.segments for shard in segment.shards]
    assert {shard.shard: shard.commit for shard in held_shards} == {
        name: commit_digest(commit) for name, commit in book.commits.items()
    }
    assert [(shard.start, shard.count) for shard in held_shards] == [
        (n * PICTURES, PICTURES) for n in range(3)
    ]
    assert (record.output, record.version, record.fingerprint) == (
        book.output,
        None,
        DATASET.fingerprint,
    )
    assert (record.feature, record.vector, record.width) == ("cls", "thumbnail", WIDTH)


def test_another_version_is_another_index(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    book.bring_up_to_date(feature="mean")
    other = vector_dataset({"mean": 6}, tiling="center-crop")
    version = other.fingerprint[:12]
    folder = version_folder(book.output, version)
    put_shard(folder, other, "z", {"mean": clustered(5, 6, 0)}, STORAGE)
    assert book.bring_up_to_date().was_up_to_date
    switch(book.output, version, other, STORAGE)
    done = book.bring_up_to_date()
    assert done.estimate.reasons == (
        f"OUTPUT is of another fingerprint now ({version}, was {DATASET.fingerprint[:12]})",
    )
    assert (done.record.version, done.record.width, done.record.live_vectors) == (version, 6, 5)
    assert set(files_below(Path(book.index))) == own_files(done.record)
    switch(book.output, None, DATASET, STORAGE)
    assert book.bring_up_to_date().record.live_vectors == 3 * PICTURES


def test_a_version_without_a_feature_that_was_asked_for(book: Book) -> None:
    """One that nobody asked for gives way to the first that is there."""
    book.bring_up_to_date()
    other = vector_dataset({"mean": 6}, tiling="center-crop")
    folder = version_folder(book.output, other.fingerprint[:12])
    put_shard(folder, other, "z", {"mean": clustered(5, 6, 0)}, STORAGE)
    switch(book.output, other.fingerprint[:12], other, STORAGE)
    record = book.bring_up_to_date().record
    assert (record.feature, record.feature_chosen, record.live_vectors) == ("mean", False, 5)
    switch(book.output, None, DATASET, STORAGE)
    done = book.bring_up_to_date(feature="cls")
    assert (done.record.feature, done.record.feature_chosen) == ("cls", True)
    assert book.bring_up_to_date().was_up_to_date
    switch(book.output, other.fingerprint[:12], other, STORAGE)
    with pytest.raises(UserError, match="no feature cls to index; it has mean"):
        book.bring_up_to_date()


def test_what_is_asked_anew_is_another_index(book: Book) -> None:
    assert book.bring_up_to_date().record.feature == "cls"
    for option, value, reason in [
        ("feature", "mean", "feature mean asked, it holds cls"),
        ("vector", "first", "vector first asked, it holds thumbnail"),
        ("kind", "hnsw", "kind hnsw, it is flat"),
    ]:
        done = book.bring_up_to_date(**{option: value})
        assert done.estimate.reasons == (reason,)
    assert book.bring_up_to_date().was_up_to_date  # what was asked for once stays
    record = read_record(book.index, STORAGE)
    assert record is not None
    assert (record.feature, record.vector, record.kind) == ("mean", "first", "hnsw")


def test_missing_files_are_made_again(book: Book, caplog: pytest.LogCaptureFixture) -> None:
    record = book.bring_up_to_date(kind="ivf-pq").record
    before = files_below(Path(book.index))
    Path(book.index, record.segments[0].pictures.path).unlink()
    with pytest.raises(UserError, match="a part that its record names is not there"):
        book.opened()
    with caplog.at_level(logging.WARNING):
        book.bring_up_to_date(kind="ivf-pq")
    assert "files are missing; built again" in caplog.text
    assert without_times(files_below(Path(book.index))) == without_times(before)
    assert record.model.trained is not None
    Path(book.index, record.model.trained.path).unlink()
    done = book.bring_up_to_date(kind="ivf-pq")
    assert done.estimate.reasons == ("files of its model are missing",)
    assert without_times(files_below(Path(book.index))) == without_times(before)


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    record = json.loads(files[RECORD])
    del record["made_at"]
    return {**files, RECORD: json.dumps(record).encode()}


def test_the_estimate_comes_before_anything_is_made(book: Book) -> None:
    told: list[tuple[Estimate, bool]] = []

    def tell(estimate: Estimate) -> None:
        told.append((estimate, Path(book.index, "segments").exists()))

    book.bring_up_to_date(kind="ivf-pq", tell=tell)
    ((estimate, was_there),) = told
    assert not was_there
    assert (estimate.kind, estimate.vectors, estimate.width) == ("ivf-pq", 3 * PICTURES, WIDTH)
    assert (estimate.segments_to_build, estimate.tasks_at_once) == (1, 1)
    assert estimate.training_bytes > 0
    assert estimate.task_bytes > 0


@pytest.mark.parametrize(
    ("tasks", "where"),
    [
        (1, ""),
        (
            2,
            " on this machine (on a cluster: one a CPU), "
            "and some 600.0MiB for Ray and this command",
        ),
    ],
)
def test_the_memory_told_counts_ray_where_it_is_started(
    tasks: int, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = index_kinds.task_bytes(Flat(), 3200, 20_000)
    assert task >> 20 == 448 + 64 + 20_000 * 3200 * 4 * 5 // 4 // 2**20
    show_estimate(Estimate("flat", 9, 3200, 9, tasks, tasks, 448 << 20, task, tasks, 1, ()))
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"index: memory: 448.0MiB for the model, then {tasks} x 817.2MiB{where}"


def test_the_command_tells_and_prints(book: Book) -> None:
    done = run_cli("index", book.output, book.index, "--kind", "ivf-pq", "--json")
    assert done.returncode == 0, done.stderr
    assert "index: ivf-pq, 450 vectors of 48, " in done.stderr
    assert "memory: " in done.stderr
    document = json.loads(done.stdout)
    assert (document["vectors"], document["added"]) == (3 * PICTURES, ["a", "b", "c/d"])
    assert document["recall"]["value"] >= 0.9
    again = run_cli("index", book.output, book.index)
    assert "nothing to do: the index holds what is committed" in again.stdout
    assert again.stderr == ""
    wrong = run_cli("index", book.output, f"{book.index}2", "--feature", "tokens")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no feature tokens to index; it has cls, mean" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


def test_what_cannot_be_met_is_one_line(book: Book, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is it an OUTPUT of `extract`"):
        build_index(str(tmp_path / "nothing"), book.index)
    with pytest.raises(UserError, match=r"holds files \(such as .*\) but no index.json"):
        build_index(book.output, book.output)
    with pytest.raises(UserError, match=r"is .* an INDEX of `tessera index`"):
        VectorIndex.open(book.output, STORAGE)
    book.bring_up_to_date()
    shutil.copytree(book.output, tmp_path / "other")
    with pytest.raises(UserError, match=f"is an index of {book.output}, not of .*/other"):
        build_index(str(tmp_path / "other"), book.index)
    for name in list(book.commits):
        book.drop(name)
    with pytest.raises(UserError, match="no shard is committed; there is nothing to index"):
        build_index(book.output, f"{book.index}2")
    Path(book.index, RECORD).write_text('{"schema_version": 2}')
    with pytest.raises(UserError, match=r"index\.json: output: Field required"):
        book.opened()
    Path(book.index, RECORD).write_text('{"schema_version": 1, "recall": null}')
    with pytest.raises(UserError, match=r"version 1, this program reads 2; give a new INDEX"):
        book.opened()


def test_a_damaged_file_is_told(book: Book) -> None:
    record = book.bring_up_to_date().record
    file = Path(book.index, record.segments[0].index.path)
    data = file.read_bytes()
    file.write_bytes(b"x" * len(data))
    with pytest.raises(UserError, match=r"\.faiss: cannot be read \(.*\); remove it and run"):
        book.opened()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{len(data) - 1} bytes, the record says {len(data)}"):
        book.opened()


def test_two_at_once(book: Book) -> None:
    with (
        held(book.index, "another", STORAGE),
        pytest.raises(UserError, match="another run is at work there"),
    ):
        book.bring_up_to_date()
    assert book.bring_up_to_date().record.live_vectors == 3 * PICTURES


def test_a_run_that_was_succeeded_removes_nothing(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused after it had found nothing to do; another took over, and indexed a shard."""
    # The lease is written to here, which its own thread must not do meanwhile.
    monkeypatch.setattr("pipeline.lease.RENEW_SECONDS", 1e6)
    book.bring_up_to_date()
    find = index_job.find_orphans
    succeeded: list[IndexRecord] = []

    def find_late(index: str, record: IndexRecord, storage: Storage) -> list[str]:
        monkeypatch.setattr(index_job, "find_orphans", find)
        book.put("new", seed=51)
        (lease,) = Path(index, RUNS).glob("lease-*.json")
        holder = json.loads(lease.read_text())  # as it is taken for dead after a pause
        lease.write_text(json.dumps(holder | {"process": f"{holder['process']}0"}))
        succeeded.append(book.bring_up_to_date().record)
        return find(index, record, storage)

    monkeypatch.setattr(index_job, "find_orphans", find_late)
    with pytest.raises(BrokenRunError, match=r"the run stops: .*lease is gone"):
        book.bring_up_to_date()
    (record,) = succeeded
    assert set(files_below(Path(book.index))) == own_files(record)
    assert places(book.opened().search(book.vectors["new"][:1], 1)[0]) == [("new", 0)]


class Meanwhile(Storage):
    """Does something once, right after a file was read whose url ends so."""

    def __init__(self, end: str, act: Callable[[], object]) -> None:
        super().__init__()
        self._end = end
        self._act: Callable[[], object] | None = act

    def read(self, url: str, crc32: int | None = None) -> bytes:
        data = super().read(url, crc32)
        if url.endswith(self._end) and self._act is not None:
            act, self._act = self._act, None
            act()
        return data


def test_an_index_replaced_while_it_is_opened_is_the_new_one(book: Book) -> None:
    book.bring_up_to_date()

    def replace() -> None:
        book.drop("a")
        book.drop("b")
        book.bring_up_to_date()

    index = VectorIndex.open(book.index, Meanwhile(RECORD, replace))
    assert index.record.live_vectors == PICTURES


def test_an_open_index_goes_on_when_it_is_replaced(book: Book) -> None:
    book.bring_up_to_date()
    index = book.opened()
    for name in ("a", "b"):
        book.drop(name)
    book.bring_up_to_date()
    query = clustered(1, WIDTH, 0)
    assert len(index.search(query, 3 * PICTURES)[0]) == 3 * PICTURES


def test_an_output_that_changes_while_it_is_read_is_looked_at_again(
    book: Book, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changing = Meanwhile("commits/b.json", lambda: book.put("b", seed=77))
    monkeypatch.setattr("jobs.index.Storage", lambda options: changing)
    with caplog.at_level(logging.WARNING):
        record = book.bring_up_to_date().record
    assert "shard b of OUTPUT has changed meanwhile; looking again" in caplog.text
    held_shards = {s.shard: s.commit for s in record.segments[0].shards}
    assert held_shards["b"] == commit_digest(book.commits["b"])
    assert places(book.opened().search(book.vectors["b"][:1], 1)[0]) == [("b", 0)]


KILLED = """
import os, signal, sys
from pipeline import storage
left = int(sys.argv[3])
def counted(method):
    def call(self, url, *args):
        global left
        if "/segments/" in url or "/models/" in url or url.endswith("/index.json"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return method(self, url, *args)
    return call
for name in ("publish_bytes", "publish_file", "remove_objects"):
    setattr(storage.Storage, name, counted(getattr(storage.Storage, name)))
from jobs.index import build_index
build_index(sys.argv[1], sys.argv[2], kind="ivf-pq")
"""


@pytest.mark.parametrize("point", [1, 6, 9, 10])
def test_a_killed_run_ends_equal_when_it_is_run_again(
    book: Book, tmp_path: Path, point: int
) -> None:
    """Killed at its first, fourth … writing: in the model, in a segment, before the record, and
    before what it replaced was removed. Every point is the real process and a real SIGKILL."""
    book.bring_up_to_date(kind="flat")  # what is replaced
    (tmp_path / "node").mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, book.output, book.index, str(point)],
        # The caller's environment: it may choose the kernels that the model is trained with.
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "node")},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    assert not any((tmp_path / "node").iterdir())  # nor does it leave anything on its machine
    index = book.opened()  # as it was, or as it is to be: whole
    assert index.record.kind == ("ivf-pq" if point == 10 else "flat")
    for name, values in book.vectors.items():
        assert places(index.search(values[:1], 1)[0]) == [(name, 0)]
    made = {p: p.stat().st_mtime_ns for p in Path(book.index).rglob("*.json")}
    done = book.bring_up_to_date(kind="ivf-pq")
    assert set(files_below(Path(book.index))) == own_files(done.record)
    for path, time in made.items():  # what was whole is not made again
        if path.name != RECORD and path.exists():
            assert path.stat().st_mtime_ns == time
    again = Book(str(Path(book.output).parent))
    again.index = f"{book.index}-fresh"
    again.bring_up_to_date(kind="ivf-pq")
    assert without_times(files_below(Path(book.index))) == without_times(
        files_below(Path(again.index))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(book: Book, kind: Kind, value: float) -> None:
    """In the sample, and in a shard that comes later."""
    values = {name: clustered(20, WIDTH, 5) for name in ("cls", "mean")}
    values["cls"][13, 7] = value
    bad = put_shard(book.output, DATASET, "z", values, STORAGE, group_rows=8)
    said = f"{book.output}: shard z: cls is not finite; see `tessera verify`"
    with pytest.raises(UserError, match=said):
        book.bring_up_to_date(kind=kind)
    drop_shard(book.output, bad, STORAGE)
    before = book.bring_up_to_date(kind=kind).record
    put_shard(book.output, DATASET, "z", values, STORAGE, group_rows=8)
    with pytest.raises(UserError, match=said):
        book.bring_up_to_date(kind=kind)
    assert read_record(book.index, STORAGE) == before


def test_a_commit_whose_parts_hold_another_number_is_refused(book: Book) -> None:
    values = {name: clustered(20, WIDTH, 5) for name in ("cls", "mean")}
    commit = put_shard(book.output, DATASET, "z", values, STORAGE)
    wrong = commit.model_copy(update={"samples": 21})
    STORAGE.publish_bytes(commit_url(book.output, "z"), wrong.dump())
    said = "shard z: 20 pictures, its commit has 21; see `tessera verify`"
    with pytest.raises(UserError, match=said):
        book.bring_up_to_date()
    drop_shard(book.output, commit, STORAGE)
    book.bring_up_to_date()
    put_shard(book.output, DATASET, "z", values, STORAGE)
    STORAGE.publish_bytes(commit_url(book.output, "z"), wrong.dump())
    with pytest.raises(UserError, match=said):
        book.bring_up_to_date()


LIMITED = """
import resource, sys
from jobs.index import build_index
from model.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    build_index(sys.argv[1], sys.argv[2], kind="flat")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", ["half", "the last byte"])
def test_a_full_temporary_folder_is_one_line(book: Book, tmp_path: Path, limit: str) -> None:
    """Nothing that was cut is ever published."""
    record = book.bring_up_to_date(kind="flat").record
    size = record.segments[0].index.bytes
    index = tmp_path / "limited"
    done = subprocess.run(
        [
            sys.executable, "-c", LIMITED, book.output, str(index),
            str(size // 2 if limit == "half" else size - 1),
        ],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}: cannot hold {record.segments[0].name}.faiss (File too large)" in (
        done.stdout
    )
    assert "make room, or set TMPDIR to a larger folder" in done.stdout
    assert not list(index.glob("segments/*.faiss"))
    assert not list(index.glob("segments/*.json"))


def test_output_and_index_on_s3(s3_server: Callable[[str], S3Server]) -> None:
    server = s3_server("moto")
    root = server.make_bucket(f"index-{uuid4().hex}")
    book = Book(root, Storage(server.options))
    for seed, name in enumerate(["a", "b"]):
        book.put(name, seed)
    book.bring_up_to_date(kind="ivf-pq")
    book.put("b", seed=20)
    book.put("c", seed=21)
    done = book.bring_up_to_date(kind="ivf-pq")
    assert (done.added, done.changed) == (("c",), ("b",))
    index = book.opened()
    for name, values in book.vectors.items():
        assert [places(f)[0] for f in index.search(values, 1)] == [
            (name, n) for n in range(PICTURES)
        ]
    keys = {key.removeprefix("index/") for key in server.objects(root.removeprefix("s3://"))}
    assert {key for key in keys if not key.startswith("out/")} == own_files(done.record)


def test_options_have_the_values_that_the_index_takes() -> None:
    assert get_args(cli.IndexKind) == KINDS
    assert get_args(cli.IndexVector) == VECTOR_CHOICES


def test_searches_may_run_side_by_side(book: Book) -> None:
    """A server answers several at once."""
    book.bring_up_to_date(kind="ivf-pq")
    index = book.opened()
    found: dict[int, list[list[Neighbor]]] = {}

    def search(number: int) -> None:
        found[number] = index.search(book.vectors["a"], 3)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] == found[0] for number in range(4)] == [True] * 4


def test_every_object_of_a_part_decides_whether_a_shard_has_changed() -> None:
    """Keys and captions of `npy` lie beside the part's own object."""

    def commit(own: str, keys: str) -> Commit:
        beside = PublishedObject(path="k", bytes=1, sha256=keys)
        part = PartFile(path="o", bytes=1, sha256=own, rows=1, beside=(beside,))
        return a_commit("a").model_copy(update={"parts": (part,)})

    digests = {commit_digest(commit(own, keys)) for own in "xy" for keys in "xy"}
    assert len(digests) == 4
