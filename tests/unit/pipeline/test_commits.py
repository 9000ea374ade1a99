"""dataset.json guards OUTPUT; a commit is read back as it was written or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline.commits import (
    Commit,
    Computed,
    Dataset,
    Embedder,
    PartFile,
    Source,
    StageSeconds,
    commit_url,
    committed_shards,
    open_output,
    read_commits,
    read_dataset,
)
from tests.builders import files_below
from tests.stages import STORAGE

SETTINGS = {
    "tiling": "dynamic", "max_tiles": 12, "layer": 2, "carry": ("txt",), "image_key": ("jpg",),
    "embedding_dtype": "float16",
}  # fmt: skip


def dataset(weights: str = "w" * 64, model: str = "m", **settings: Any) -> Dataset:
    return Dataset.describe(model, None, weights, {**SETTINGS, **settings}, {"cls": 80}, "0.1.0")


def commit(shard: str) -> Commit:
    return Commit(
        schema_version=1,
        fingerprint="f" * 64,
        shard=shard,
        source=Source(url=f"in/{shard}.tar", size=10, etag=None),
        samples=3,
        tiles=2,
        rejects=1,
        truncated_at=None,
        parts=(PartFile(path=f"embeddings/{shard}.parquet", bytes=1, sha256="0" * 64, rows=2),),
        rejects_part=None,
        computed=(Computed(device="cpu", tensor_parallel=1, attention="sdpa", batch_tiles=4),),
        seconds=StageSeconds(read=1, tile=2, embed=3, write=4),
        committed_at="2026-01-01T00:00:00+00:00",
        tile_counts={1: 4, 13: 2},
        reject_codes={"decode/truncated": 1},
        replicas=(Embedder(node="10.0.0.1", replica="a-1", tiles=2, seconds=3),),
    )


def put(output: Path, name: str, data: bytes = b"x") -> None:
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(data)


def test_the_fingerprint_covers_what_decides_values_and_columns() -> None:
    reordered = dict(reversed(SETTINGS.items()))
    same = [
        dataset(),
        dataset(model="/elsewhere"),
        dataset(carry=["txt"]),
        Dataset.describe("m", "r", "w" * 64, reordered, {"cls": 80}, "0.2.0"),
    ]
    assert len({d.fingerprint for d in same}) == 1
    others = [
        dataset(weights="v" * 64),
        dataset(layer=1),
        dataset(more=None),
        dataset(carry=("json",)),
        Dataset.describe("m", None, "w" * 64, SETTINGS, {"mean": 80}, "0.1.0"),
        Dataset.describe("m", None, "w" * 64, SETTINGS, {"cls": 64}, "0.1.0"),
    ]
    assert len({d.fingerprint for d in [same[0], *others]}) == 1 + len(others)


def test_a_new_output_gets_its_dataset_and_takes_the_same_again(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    open_output(output, dataset(), STORAGE)
    before = files_below(tmp_path)
    open_output(output, dataset(model="/elsewhere"), STORAGE)
    assert files_below(tmp_path) == before
    assert list(before) == ["out/dataset.json"]
    found = read_dataset(output, STORAGE)
    assert found == dataset()
    assert found.settings["carry"] == ["txt"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (dataset(max_tiles=6), r"\(max_tiles: 12 there, 6 asked\)"),
        (dataset(carry=()), r"\(carry: \['txt'\] there, \[\] asked\)"),
        (dataset(weights="v" * 64), r"\(weights: wwwwwwwwwwww there, vvvvvvvvvvvv asked\)"),
        (dataset(layer=1, max_tiles=6), r"\(layer: 2 there, 1 asked; max_tiles: 12 there"),
    ],
)
def test_an_output_of_other_settings_is_refused_by_name(
    wanted: Dataset, said: str, tmp_path: Path
) -> None:
    open_output(str(tmp_path), dataset(), STORAGE)
    STORAGE.publish_bytes(commit_url(str(tmp_path), "a"), b"{}")
    with pytest.raises(UserError, match=said) as caught:
        open_output(str(tmp_path), wanted, STORAGE)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_dataset(str(tmp_path), STORAGE) == dataset()


def test_an_output_that_holds_other_files_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "photos/cat.jpg")
    with pytest.raises(UserError, match=r"holds files \(such as photos/cat.jpg\)"):
        open_output(str(tmp_path), dataset(), STORAGE)
    assert list(files_below(tmp_path)) == ["photos/cat.jpg"]


def test_what_a_killed_run_left_of_its_dataset_is_no_foreign_file(tmp_path: Path) -> None:
    put(tmp_path, "dataset.json.tmp-0123abcd", b"{")
    open_output(str(tmp_path), dataset(), STORAGE)
    assert read_dataset(str(tmp_path), STORAGE) == dataset()


def test_what_is_no_output_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json there"):
        read_dataset(str(tmp_path), STORAGE)


def test_a_record_comes_out_as_it_went_in() -> None:
    assert Commit.parse(commit("a/b").dump(), "url") == commit("a/b")
    assert Dataset.parse(dataset().dump(), "url") == dataset()


def test_a_commit_of_an_earlier_version_is_read() -> None:
    fields = json.loads(commit("a").dump())
    for name in ("tile_counts", "reject_codes", "replicas"):
        del fields[name]
    read = Commit.parse(json.dumps(fields).encode(), "u")
    assert (read.tile_counts, read.reject_codes, read.replicas) == ({}, {}, ())
    assert read.tiles == 2


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"samples": "many"}, r"^u/a\.json: samples: Input should be a valid integer"),
        ({"extra": 1}, r"^u/a\.json: extra: Extra inputs are not permitted"),
        ({"parts": [{}]}, r"^u/a\.json: parts\.0\.path: Field required"),
    ],
)
def test_a_record_of_other_fields_is_refused(edit: dict[str, Any], said: str) -> None:
    fields = {**json.loads(commit("a").dump()), **edit}
    with pytest.raises(UserError, match=said):
        Commit.parse(json.dumps(fields).encode(), "u/a.json")


def test_a_record_that_breaks_off_is_refused_at_every_byte() -> None:
    data = commit("a").dump().rstrip()
    for cut in range(len(data)):
        with pytest.raises(UserError, match=r"^u: the document: Invalid JSON"):
            Commit.parse(data[:cut], "u")


def test_commits_are_listed_and_read_by_their_shards_names(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert committed_shards(output, STORAGE) == set()
    for shard in ("a", "a/b", "c-00001"):
        STORAGE.publish_bytes(commit_url(output, shard), commit(shard).dump())
    put(tmp_path, "commits/d.json.tmp-0123abcd")
    assert committed_shards(output, STORAGE) == {"a", "a/b", "c-00001"}
    assert list(read_commits(output, ["a/b", "a"], STORAGE)) == [commit("a/b"), commit("a")]


def test_settings_may_change_while_nothing_is_committed(tmp_path: Path) -> None:
    open_output(str(tmp_path), dataset(), STORAGE)
    wanted = dataset(max_tiles=6)
    open_output(str(tmp_path), wanted, STORAGE)
    assert read_dataset(str(tmp_path), STORAGE) == wanted
