"""Embeddings beside their samples, in lockstep; and the same as a torch dataset."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from model.errors import UserError
from pipeline.commits import Commit, Source, commit_url, open_output
from pipeline.joined import joined
from pipeline.read import pictures, vectors
from pipeline.storage import Storage
from pipeline.torch_dataset import JoinedDataset
from tests.builders import files_below, picture, sample, write_tar
from tests.outputs import BAD_PICTURE
from tests.s3 import S3Server
from tests.stages import STORAGE
from tests.vector_outputs import clustered, put_shard, sweep, vector_dataset

WIDTH = 6
FEATURES = {"cls": WIDTH}
DATASET = vector_dataset(FEATURES)


def samples_by_webdataset(tar: Path) -> list[dict[str, Any]]:
    """The project's own key rules are webdataset's; its reader is the oracle here."""
    return list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))


def test_each_picture_comes_with_its_sample(made: Path) -> None:
    got = list(joined(str(made / "out")))
    assert [(j.picture.shard, j.picture.key) for j in got] == [
        *(("a", f"{n:04d}") for n in range(8) if n != BAD_PICTURE),
        *(("a/b", f"{n:04d}") for n in range(5)),
    ]
    sources = {"a": made / "in/a.tar", "a/b": made / "in/a/b.tar"}
    for shard, tar in sources.items():
        expected = {s["__key__"]: s for s in samples_by_webdataset(tar)}
        for one in (j for j in got if j.picture.shard == shard):
            theirs = expected[one.picture.key]
            assert one.members == {e: theirs[e] for e in ("jpg", "txt", "json")}
            assert one.picture.carried["txt"] == theirs["txt"].decode()


def test_members_by_choice_and_a_source_that_has_moved(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    shutil.copytree(made / "in", tmp_path / "moved")
    for commit in (out / "commits").rglob("*.json"):
        text = commit.read_text()
        commit.write_text(text.replace(str(made / "in"), "/nowhere"))
    with pytest.raises(UserError, match=r"cannot read /nowhere/a\.tar: not found"):
        next(joined(str(out)))
    got = list(joined(str(out), members=["json"], inputs=[str(tmp_path / "moved")]))
    assert [list(j.members) for j in got] == [["json"]] * 12


@pytest.mark.parametrize("reader", [joined, JoinedDataset])
def test_a_shard_that_inputs_do_not_have_is_named(made: Path, reader: Callable[..., Any]) -> None:
    inputs = [str(made / "in/a.tar")]
    with pytest.raises(UserError, match=r"shard a/b: .*/in/a\.tar has no such shard"):
        reader(str(made / "out"), inputs=inputs)
    got = reader(str(made / "out"), inputs=inputs, shards=["a"])
    assert len(list(got)) == 7


def source_of(tar: Path) -> Source:
    return Source(url=str(tar), size=tar.stat().st_size, etag=None)


def put(output: Path, tar: Path, images: list[bytes], seed: int = 0, **options: Any) -> Commit:
    """A shard of these pictures, one tile each, with their true digests."""
    values = {"cls": clustered(len(images), WIDTH, seed)}
    keys = [f"{n:03d}" for n in range(len(images))]
    options = {"source": source_of(tar), "images": images, "keys": keys, **options}
    return put_shard(str(output), DATASET, "s", values, STORAGE, **options)


IMAGES = [picture(20, 20, seed) for seed in range(6)]


def tar_of(path: Path, images: list[bytes]) -> Path:
    members = [m for n, image in enumerate(images) for m in sample(f"{n:03d}", image, "c")]
    return write_tar(path, members)


def test_another_picture_in_the_source_is_told(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    put(tmp_path / "out", tar, IMAGES)
    assert len(list(joined(str(tmp_path / "out")))) == 6
    data = bytearray(tar.read_bytes())
    at = bytes(data).index(IMAGES[3])
    data[at + len(IMAGES[3]) // 2] ^= 1
    tar.write_bytes(data)
    reader = joined(str(tmp_path / "out"))
    assert [next(reader).picture.sample_index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"sample 3 \('003'\) is another picture; bring OUTPUT up"):
        next(reader)


def swapped(tar: Path) -> None:
    """The same keys and size, other captions; neighbours have exchanged their pictures."""
    images = [IMAGES[n ^ 1] for n in range(6)]
    members = [m for n, image in enumerate(images) for m in sample(f"{n:03d}", image, "d")]
    before = tar.stat().st_size
    assert write_tar(tar, members).stat().st_size == before


@pytest.mark.parametrize("members", [["txt"], ["jpg"], None, []])
def test_a_changed_source_of_the_same_size_is_told(
    tmp_path: Path, members: list[str] | None
) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    put(tmp_path / "out", tar, IMAGES)
    assert [set(j.members) for j in joined(str(tmp_path / "out"), members=members)] == (
        [{"jpg", "txt"} if members is None else set(members)] * 6
    )
    swapped(tar)
    with pytest.raises(UserError, match=r"sample 0 \('000'\) is another picture"):
        next(joined(str(tmp_path / "out"), members=members))


def test_a_source_without_its_image_is_told(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    put(tmp_path / "out", tar, IMAGES)
    members = [m for n, image in enumerate(IMAGES) for m in sample(f"{n:03d}", image, "c")]
    write_tar(tar, [(name.replace(".jpg", ".gif"), data) for name, data in members])
    with pytest.raises(UserError, match=r"sample 0 \('000'\) is another picture"):
        next(joined(str(tmp_path / "out"), members=["txt"]))


def test_another_version_of_the_source_is_told_unless_it_has_moved(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "in/s.tar", IMAGES)
    source = Source(url=str(tar), size=tar.stat().st_size, etag=STORAGE.info(str(tar)).etag)
    put(tmp_path / "out", tar, IMAGES, source=source)
    assert len(list(joined(str(tmp_path / "out")))) == 6
    os.utime(tar, (1, 1))
    with pytest.raises(UserError, match=r"changed since it was embedded: .* bytes \(mtime-1000000"):
        next(joined(str(tmp_path / "out")))
    got = joined(str(tmp_path / "out"), inputs=[str(tmp_path / "in")])
    assert [j.members["jpg"] for j in got] == IMAGES


def test_other_keys_or_fewer_samples_are_told(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    put(tmp_path / "out", tar, IMAGES, keys=[*(f"{n:03d}" for n in range(5)), "other"])
    with pytest.raises(UserError, match="sample 5 has key '005', not 'other'"):
        list(joined(str(tmp_path / "out")))
    few = tar_of(tmp_path / "few.tar", IMAGES[:4])
    put(tmp_path / "out2", few, IMAGES)
    with pytest.raises(UserError, match="changed since it was embedded: sample 4 is not there"):
        list(joined(str(tmp_path / "out2")))


def test_a_source_of_another_size_is_told_before_anything_is_given(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    put(tmp_path / "out", tar, IMAGES)
    tar_of(tar, IMAGES + IMAGES)
    with pytest.raises(
        UserError, match=r"changed since it was embedded: .* bytes .*; bring OUTPUT up"
    ):
        next(joined(str(tmp_path / "out")))


class Replacing(Storage):
    """Puts a new source and its commit in place right before the source is first looked up."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act: Callable[[], object] | None = act

    def info(self, url: str) -> Any:
        if url.endswith(".tar") and self._act is not None:
            act, self._act = self._act, None
            act()
        return super().info(url)


def test_source_and_shard_replaced_together_come_out_new(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES[:4])
    old = put(tmp_path / "out", tar, IMAGES[:4])

    def replace() -> None:
        tar_of(tar, IMAGES)
        put(tmp_path / "out", tar, IMAGES, before=old)
        sweep(str(tmp_path / "out"), old, STORAGE)

    got = list(joined(str(tmp_path / "out"), Replacing(replace)))
    assert [j.members["jpg"] for j in got] == IMAGES


@pytest.mark.parametrize("accepted", [True, False])
def test_a_cut_archive_is_read_as_it_was_embedded(tmp_path: Path, accepted: bool) -> None:
    tar = tar_of(tmp_path / "s.tar", IMAGES)
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(IMAGES[4]) + 10])
    commit = put(tmp_path / "out", tar, IMAGES[:4])
    if accepted:
        cut = commit.model_copy(update={"truncated_at": tar.stat().st_size})
        STORAGE.publish_bytes(commit_url(str(tmp_path / "out"), "s"), cut.dump())
        assert [j.members["jpg"] for j in joined(str(tmp_path / "out"))] == IMAGES[:4]
    else:
        with pytest.raises(UserError, match="cut inside"):
            list(joined(str(tmp_path / "out")))


def seen(dataset: JoinedDataset, workers: int) -> list[tuple[str, str]]:
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return [(item["shard"], item["key"]) for item in loader]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 1), (4, 2)])
def test_ranks_and_workers_divide_the_shards(tmp_path: Path, world: int, workers: int) -> None:
    output = str(tmp_path / "out")
    for name in "abcde":
        tar = tar_of(tmp_path / f"in/{name}.tar", IMAGES)
        put_shard(
            output,
            DATASET,
            name,
            {"cls": clustered(6, WIDTH, 0)},
            STORAGE,
            keys=[f"{n:03d}" for n in range(6)],
            images=IMAGES,
            source=source_of(tar),
        )
    ranks = [
        seen(JoinedDataset(output, rank=rank, world_size=world), workers) for rank in range(world)
    ]
    everything = [pair for rank in ranks for pair in rank]
    assert sorted(everything) == [(name, f"{n:03d}") for name in "abcde" for n in range(6)]
    shards = [{shard for shard, _ in rank} for rank in ranks]
    assert sum(map(len, shards)) == 5


def test_batches_of_one_vector_a_picture(made: Path) -> None:
    output = str(made / "out")
    dataset = JoinedDataset(output, vector="mean", members=["txt"])
    batches = list(DataLoader(dataset, batch_size=4))
    assert [batch["features"]["cls"].shape for batch in batches] == [(4, 80)] * 3
    got = torch.cat([batch["features"]["cls"] for batch in batches])
    expected = np.concatenate([run.values for run in vectors(output, "cls", "mean")])
    np.testing.assert_array_equal(got.numpy(), expected)
    assert batches[0]["members"]["txt"][0] == b"caption 0000"
    tiles = [item["features"]["mean"] for item in JoinedDataset(output, features=["mean"])]
    for mine, theirs in zip(tiles, pictures(output), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.features["mean"])


def test_members_that_a_sample_does_not_have_come_empty_where_they_were_asked_for(
    tmp_path: Path,
) -> None:
    members = [m for n, image in enumerate(IMAGES) for m in sample(f"{n:03d}", image, f"c{n}")]
    tar = write_tar(tmp_path / "s.tar", [m for m in members if m[0] not in ("001.txt", "004.txt")])
    put(tmp_path / "out", tar, IMAGES)
    dataset = JoinedDataset(str(tmp_path / "out"), vector="first", members=["txt", "cls"])
    batches = list(DataLoader(dataset, batch_size=3))
    captions = [caption for batch in batches for caption in batch["members"]["txt"]]
    assert captions == [b"c0", b"", b"c2", b"c3", b"", b"c5"]
    assert [batch["members"]["cls"] for batch in batches] == [[b""] * 3] * 2
    theirs = [set(item["members"]) for item in JoinedDataset(str(tmp_path / "out"))]
    full = {"jpg", "txt"}
    assert theirs == [full, {"jpg"}, full, full, {"jpg"}, full]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 1}, "rank 1 of 1: give `rank` and `world_size` together"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"vector": "bogus"}, "no vector bogus; choose one of thumbnail, mean, first"),
        ({"features": ["nope"]}, "no feature nope; it has cls, mean"),
    ],
)
def test_wrong_options_are_told_at_once(made: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        JoinedDataset(str(made / "out"), **options)


def test_one_vector_of_many_a_tile_is_refused(tmp_path: Path) -> None:
    dataset = vector_dataset({"cls": WIDTH}).model_copy(
        update={"features": {"cls": WIDTH, "tokens": (5, WIDTH)}}
    )
    open_output(str(tmp_path), dataset, STORAGE)
    JoinedDataset(str(tmp_path), vector="mean", features=["cls"])
    JoinedDataset(str(tmp_path))
    with pytest.raises(UserError, match=r"feature tokens is .* values a tile, no vector"):
        JoinedDataset(str(tmp_path), vector="mean")


def test_workers_read_from_s3(made: Path, s3_server: Callable[[str], S3Server]) -> None:
    server = s3_server("moto")
    name = f"joined-{uuid4().hex}"
    objects = {f"out/{k}": v for k, v in files_below(made / "out").items()}
    for key, data in objects.items():
        if key.startswith("out/commits/"):
            commit = Commit.parse(data, key)
            url = commit.source.url.replace(str(made), f"s3://{name}")
            source = commit.source.model_copy(update={"url": url, "etag": None})
            objects[key] = commit.model_copy(update={"source": source}).dump()
    bucket = server.make_bucket(
        name, objects | {f"in/{k}": v for k, v in files_below(made / "in").items()}
    )
    dataset = JoinedDataset(f"{bucket}/out", Storage(server.options), vector="thumbnail")
    items = list(DataLoader(dataset, batch_size=None, num_workers=2))
    mine = {(item["shard"], item["key"]): item for item in items}
    assert len(mine) == 12
    for one in joined(str(made / "out")):
        item = mine[one.picture.shard, one.picture.key]
        assert item["members"] == one.members
        np.testing.assert_array_equal(
            item["features"]["cls"].numpy(), one.picture.features["cls"][-1].astype(np.float32)
        )


def test_readers_leave_no_file_open(made: Path) -> None:
    def held() -> int:
        files = (file.path for file in psutil.Process().open_files())
        return sum(path.startswith(str(made / "out")) for path in files)

    reader = pictures(str(made / "out"))
    next(reader)
    assert held() > 0
    reader.close()
    assert held() == 0
