"""`tessera search`: a picture finds itself, and whatever cannot be looked for is told in a line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import query
from jobs.index import build_index
from jobs.query import QueryEncoder, indexed_dataset, indexed_folder
from jobs.search import Query, distance, nearest_to_key, search, show_neighbors, to_json
from model.errors import UserError
from pipeline import isolation
from pipeline.one_vector import VectorChoice
from pipeline.read import vectors
from pipeline.samples import read_samples
from pipeline.tar_stream import read_members
from pipeline.vector_index import Neighbor, VectorIndex
from tests.browsing import index_with_twins, make_index
from tests.builders import files_below, picture, run_cli, write_checkpoint
from tests.hostile.fragile import faulty
from tests.hostile.pictures import png, png_chunk
from tests.s3 import S3Server
from tests.stages import STORAGE


def images(tar: Path) -> dict[str, bytes]:
    members = read_members(str(tar), STORAGE, STORAGE.info(str(tar)))
    return {s.key: s.members["jpg"].data or b"" for s in read_samples(members, frozenset({"jpg"}))}


@pytest.fixture(scope="module")
def index(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(made, tmp_path_factory.mktemp("search") / "index")


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    """A picture of shard `a`, in a file of its own."""
    path = tmp_path / "q.jpg"
    path.write_bytes(images(made / "in/a.tar")["0002"])
    return path


@pytest.mark.parametrize(
    ("feature", "choice"), [("cls", "thumbnail"), ("cls", "mean"), ("mean", "first")]
)
def test_a_query_has_the_vector_of_the_same_picture_in_output(
    made: Path, tmp_path: Path, feature: str, choice: VectorChoice
) -> None:
    opened = VectorIndex.open(
        make_index(made, tmp_path / "index", feature=feature, vector=choice), STORAGE
    )
    encoder = QueryEncoder(opened.record, STORAGE, None)
    try:
        compared = 0
        for run in vectors(str(made / "out"), feature, choice, shards=["a"]):
            data = images(made / "in/a.tar")
            for key, stored in zip(run.pictures["key"].to_pylist(), run.values, strict=True):
                vector = encoder.vector(data[key], key)
                assert vector.dtype == np.float32
                np.testing.assert_allclose(vector, stored, rtol=2e-3, atol=2e-3)
                nearest = opened.search(vector[np.newaxis], 1)[0][0]
                assert (nearest.key, nearest.shard) == (key, "a")
                compared += 1
        assert compared == 7
    finally:
        encoder.close()


def test_a_picture_file_finds_itself(index: str, image: Path) -> None:
    found = search(index, Query(image=image), 3)
    assert (found[0].key, found[0].shard, found[0].sample_index) == ("0002", "a", 2)
    assert found[0].caption == "caption 0002"
    assert distance(found[0]) < 1e-5
    assert distance(found[0]) < distance(found[1]) <= distance(found[2])


def test_a_key_finds_the_others(made: Path, index: str) -> None:
    opened = VectorIndex.open(index, STORAGE)
    around = nearest_to_key(opened, "0001", "a", 100)
    assert (around.asked.key, around.asked.shard) == ("0001", "a")
    assert len(around.neighbors) == 11
    assert ("0001", "a/b") in {(n.key, n.shard) for n in around.neighbors}
    assert ("0001", "a") not in {(n.key, n.shard) for n in around.neighbors}
    assert [distance(n) for n in around.neighbors] == sorted(map(distance, around.neighbors))
    expected = opened.vector_of("0001", "a") @ opened.vector_of("0003", "a/b")
    (other,) = [n for n in around.neighbors if (n.key, n.shard) == ("0003", "a/b")]
    assert distance(other) == pytest.approx(1 - expected, abs=1e-6)
    assert search(index, Query(key="0001", shard="a"), 2) == list(around.neighbors[:2])
    assert len(search(index, Query(key="0007"), 5)) == 5  # one shard alone has it


def test_of_two_pictures_of_one_key_and_shard_the_one_that_is_meant(
    made: Path, tmp_path: Path
) -> None:
    index = index_with_twins(tmp_path, made / "ckpt")
    opened = VectorIndex.open(index, STORAGE)
    for meant, other in ((3, 8), (8, 3)):
        around = nearest_to_key(opened, "k3", "s", 100, meant)
        assert (around.asked.key, around.asked.shard, around.asked.sample_index) == (
            "k3",
            "s",
            meant,
        )
        assert {n.sample_index for n in around.neighbors} == {*range(50)} - {meant}
        expected = opened.vector_of("k3", "s", meant) @ opened.vector_of("k3", "s", other)
        (twin,) = [n for n in around.neighbors if n.sample_index == other]
        assert distance(twin) == pytest.approx(1 - expected, abs=1e-6)
        assert distance(twin) > 1e-4
    with pytest.raises(UserError, match="no picture with key k3 in shard s"):
        opened.vector_of("k3", "s", 4)
    for shard in (None, "s"):
        with pytest.raises(UserError) as caught:
            search(index, Query(key="k3", shard=shard), 3)
        told = "key k3 is that of samples 3, 8 of shard s; give the picture itself, not its key"
        assert str(caught.value) == f"{index}: {told}"


def test_a_picture_is_told_apart_from_many_equal_ones(made: Path, tmp_path: Path) -> None:
    """The search for 19 finds any 19 of the 40; the one that was asked for is not among them."""
    opened = VectorIndex.open(index_with_twins(tmp_path, made / "ckpt"), STORAGE)
    for number in range(40):
        around = nearest_to_key(opened, f"same{number}", None, 18)
        assert (around.asked.key, around.asked.sample_index) == (f"same{number}", 10 + number)
        assert len(around.neighbors) == 18
        assert 10 + number not in {n.sample_index for n in around.neighbors}
        assert max(map(distance, around.neighbors)) < 1e-6


def test_a_key_needs_neither_model_nor_output(copy: Path, tmp_path: Path) -> None:
    index = make_index(copy, tmp_path / "index")
    shutil.rmtree(copy)
    assert len(search(index, Query(key="0007"), 4)) == 4
    with pytest.raises(UserError, match=r"out: no dataset\.json there"):
        QueryEncoder(VectorIndex.open(index, STORAGE).record, STORAGE, None)


def test_which_picture_must_be_said_once() -> None:
    with pytest.raises(UserError, match="expected one of --image FILE, --key KEY"):
        Query()
    with pytest.raises(UserError, match="expected one of --image FILE, --key KEY"):
        Query(image=Path("a"), key="a")
    with pytest.raises(UserError, match="--shard says in which shard --key is"):
        Query(image=Path("a"), shard="a")


def resized(side: int) -> tuple[bytes, bytes]:
    """The header of a PNG of one pixel, and the same for a picture of side × side."""
    header = [struct.pack(">IIBBBBB", n, n, 8, 0, 0, 0, 0) for n in (1, side)]
    return png_chunk(b"IHDR", header[0]), png_chunk(b"IHDR", header[1])


BAD: dict[str, tuple[bytes, str]] = {
    "text": (b"hello", "decode: unidentified: 5 bytes in none of the accepted formats"),
    "empty": (b"", "decode: unidentified: 0 bytes"),
    "cut": (picture(90, 60)[:700], "decode: truncated"),
    "bomb": (png(1, 1).replace(*resized(20_000)), "decode: decompression-bomb"),
    "no width": (png(1, 1).replace(*resized(0)), "decode: zero-size"),
    "crash": (faulty(picture(90, 60), "load-segv"), "decode: crashed: its decoder's process died"),
    "memory": (faulty(picture(90, 60), "load-memory"), "decode: memory"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_told_in_a_line_before_the_model_is_loaded(
    index: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "matching_checkpoint", None)
    monkeypatch.setattr(isolation, "CHILD", "tests.hostile.fragile")
    data, message = BAD[kind]
    path = tmp_path / "q"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        search(index, Query(image=path), 3)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: decode: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_or_too_large(
    index: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file or directory\)"):
        search(index, Query(image=tmp_path / "none"), 3)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give a picture"):
        search(index, Query(image=tmp_path), 3)
    monkeypatch.setattr(query, "MAX_MEMBER_BYTES", image.stat().st_size - 1)
    with pytest.raises(UserError, match=r"q.jpg: more than 0 MiB; give a smaller picture"):
        search(index, Query(image=image), 3)
    with pytest.raises(UserError, match="an INDEX of `tessera index`"):
        search(str(tmp_path), Query(key="0001"), 3)


def test_the_model_that_made_output(copy: Path, tmp_path: Path) -> None:
    """Moved: --model says where to. Another one: refused."""
    index = make_index(copy, tmp_path / "index")
    image = tmp_path / "q.jpg"
    image.write_bytes(images(copy / "in/a.tar")["0002"])
    change_dataset(copy, lambda dataset: dataset.update(model=str(copy / "ckpt")))
    moved = (copy / "ckpt").rename(copy / "moved")
    with pytest.raises(UserError, match="ckpt: no such folder"):
        search(index, Query(image=image), 1)
    assert search(index, Query(image=image), 1, model=str(moved))[0].key == "0002"
    other = write_checkpoint(copy / "other", "layer_norm")
    with pytest.raises(UserError, match=r"are not those that made the output .* --model"):
        search(index, Query(image=image), 1, model=str(other))


def test_output_was_made_anew_since(copy: Path, tmp_path: Path, image: Path) -> None:
    index = make_index(copy, tmp_path / "index")
    change_dataset(copy, lambda dataset: dataset.update(fingerprint="0" * 64))
    with pytest.raises(UserError, match="since it was indexed; run `tessera index` again"):
        search(index, Query(image=image), 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda settings: settings.pop("tile_size"), "tile_size: Field required"),
        (lambda settings: settings.pop("dtype"), "dtype: Field required"),
        (lambda settings: settings.pop("layer"), "layer: Field required"),
        (lambda settings: settings.update(dtype="int4"), "dtype: Input should be 'bfloat16', "),
        (lambda settings: settings.update(tile_size=0), "tile_size: Input should be greater than "),
        (lambda settings: settings.update(max_tiles="x"), "max_tiles: Input should be a valid int"),
    ],
)
def test_a_setting_that_is_missing_or_none_is_told(
    copy: Path, tmp_path: Path, image: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    index = make_index(copy, tmp_path / "index")
    change_dataset(copy, lambda dataset: change(dataset["settings"]))
    with pytest.raises(UserError) as caught:
        search(index, Query(image=image), 1)
    assert str(caught.value).startswith(f"{copy}/out/dataset.json: settings.{told}")
    assert "\n" not in str(caught.value)
    assert len(search(index, Query(key="0007"), 1)) == 1


def test_an_output_whose_name_is_not_recorded_as_it_is(copy: Path, image: Path) -> None:
    """An index has no secrets and no marks of direction; OUTPUT cannot be found by such a name."""
    marked = (copy / "out").rename(copy / "o\u200fut")
    index = str(copy / "index")
    build_index(str(marked), index)
    hint = (
        "INDEX has OUTPUT's name without user, password, query and control characters: if it has "
        "any, run `tessera index` with a name that has none"
    )
    with pytest.raises(UserError) as caught:
        search(index, Query(image=image), 1)
    assert str(caught.value) == (
        f"{copy}/o\\u200fut: no dataset.json there; is it an OUTPUT of `extract`?; {hint}"
    )
    assert len(search(index, Query(key="0007"), 1)) == 1
    record = VectorIndex.open(index, STORAGE).record
    plain = record.model_copy(update={"output": str(copy / "none")})
    with pytest.raises(UserError, match=r"is it an OUTPUT of `extract`\?$"):
        indexed_dataset(plain, STORAGE)
    url = record.model_copy(update={"output": "memory://host/none"})
    with pytest.raises(
        UserError, match=r"host/none: no dataset.json .* with a name that has none$"
    ):
        indexed_dataset(url, STORAGE)


def test_index_and_output_on_s3(made: Path, image: Path, s3: S3Server) -> None:
    files = {f"out/{name}": data for name, data in files_below(made / "out").items()}
    bucket = s3.make_bucket("searched", files)
    build_index(f"{bucket}/out", f"{bucket}/index", storage_options=s3.options)
    index = f"{bucket}/index"
    (first,) = search(index, Query(image=image), 1, storage_options=s3.options)
    assert (first.key, first.shard) == ("0002", "a")
    assert distance(first) < 1e-5
    found = search(index, Query(key="0007"), 20, storage_options=s3.options)
    assert len(found) == 11


def test_the_version_that_was_indexed(index: str) -> None:
    record = VectorIndex.open(index, STORAGE).record
    assert indexed_folder(record) == record.output
    version = record.model_copy(update={"version": "0123456789ab"})
    assert indexed_folder(version) == f"{record.output}/versions/0123456789ab"


def change_dataset(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "out/dataset.json"
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_neighbors(
        [
            Neighbor("a\x1b[2J", "s/1", 3, 1.0000001, "line\none\u202e"),
            Neighbor("b", "s", 4, 0.25, None),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "distance  key       shard  caption",
        r"0.0000    a\x1b[2J  s/1    line\none\u202e",
        "0.7500    b         s",
    ]
    assert to_json(Neighbor("b", "s", 4, 0.25, None)) == {
        "key": "b",
        "shard": "s",
        "sample_index": 4,
        "caption": None,
        "distance": 0.75,
    }


def test_the_command(index: str, image: Path, tmp_path: Path) -> None:
    done = run_cli("search", index, "--image", image, "--count", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads(done.stdout)["neighbors"]
    assert (first["key"], first["shard"], first["caption"]) == ("0002", "a", "caption 0002")
    assert 0 <= first["distance"] < 1e-5 < second["distance"]

    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"hello")
    done = run_cli("search", index, "--image", bad)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tessera: {bad}: decode: unidentified: 5 bytes")
    assert done.stderr.count("\n") == 1
