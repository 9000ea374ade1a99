"""Every format gives back the rows that Parquet has, on disk and on S3; same input, same bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from model.errors import UserError
from pipeline import webdataset_format, writers
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, Dataset, Format, open_output
from pipeline.formats import open_local, open_part, part_tables
from pipeline.part_copies import PartError
from pipeline.read import dataset as dataset_of
from pipeline.read import pictures, vectors
from pipeline.records import Shape, Shard
from pipeline.samples import ReadSettings
from pipeline.storage import Storage
from pipeline.tiling import Tiling
from pipeline.vectors import feature_values
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import files_below, picture, tar_bytes, write_tar
from tests.s3 import S3Server, moto
from tests.stages import (
    IMAGE_KEY,
    SHAPES,
    STORAGE,
    TILING,
    compute_shard,
    encode_all,
    part_settings,
)

CARRY = ("txt", "json:url", "bin")
FORMATS: tuple[Format, ...] = ("parquet", "webdataset", "npy")
CENTER = Tiling("center-crop", 28, 28)
KEYS = [
    "a/b.c/0001",
    "a/b.c/0002",
    "plain",
    "käse ü",
    "../../etc/passwd",
    "/root/x",
    "plain",
    "z" * 230,
    f"{'d' * 90}/{'e' * 90}",  # for an extended header
    "plain.json/x",  # a folder where a file is
    "plain.0.NPY/x",
]
FEATURES = [("cls",), ("mean", "cls"), ("tokens",), ("cls", "tokens-2x2", "tokens")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names of every kind; one picture is none, one sample has no other members."""
    members: list[tuple[str, bytes]] = []
    for number, key in enumerate(KEYS):
        image = b"no picture" if key == "a/b.c/0002" else picture(40 + 9 * number, 50, number)
        members.append((f"{key}.jpg", image))
        if number != 2:
            members.append((f"{key}.txt", f"caption {number} „é“".encode()))
            members.append((f"{key}.json", json.dumps({"url": f"u/{number}"}).encode()))
            members.append((f"{key}.bin", bytes(range(number, 256))))
    path = tmp_path_factory.mktemp("in") / "s.tar"
    path.write_bytes(tar_bytes(members, tarfile.PAX_FORMAT))
    return path


def shapes(names: tuple[str, ...]) -> dict[str, Shape]:
    return {name: SHAPES[name] for name in names}


def settings_of(
    output: Path | str,
    format: Format,
    features: tuple[str, ...] = ("cls",),
    target_part_bytes: int = 1 << 30,
    **options: Any,
) -> FinalizeSettings:
    parts = part_settings(output, shapes(features), carry=CARRY, format=format, **options)
    return FinalizeSettings(parts, "f" * 64, target_part_bytes)


def commit_of(
    source: Path, settings: FinalizeSettings, tiling: Tiling = TILING, shard: str = "x/s"
) -> Commit:
    read = ReadSettings(STORAGE, IMAGE_KEY, CARRY)
    tile = TileSettings(tiling, CARRY, 60.0, chunk_tiles=5)
    whole = compute_shard(Shard(str(source), shard), read, tile, encode_all, settings.parts)
    return finalize_shard(whole, settings)


def rows_of(commit: Commit, settings: FinalizeSettings) -> pa.Table:
    parts = settings.parts
    tables = [
        table
        for part in commit.parts
        for table in part_tables(part, parts.output, parts.layout, parts.storage)
    ]
    return pa.concat_tables(tables).combine_chunks()


@pytest.fixture(scope="module")
def s3_moto() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("tiling", "embedding_dtype"),
    [(TILING, "float16"), (CENTER, "float32")],
    ids=["dynamic", "center-crop"],
)
def test_rows_come_back_as_parquet_has_them(
    features: tuple[str, ...],
    format_: Format,
    tiling: Tiling,
    embedding_dtype: str,
    source: Path,
    tmp_path: Path,
) -> None:
    for target in (1 << 30, 1000):
        plain = settings_of(tmp_path / f"p{target}", "parquet", features, target,
                            embedding_dtype=embedding_dtype)  # fmt: skip
        ours = settings_of(tmp_path / f"o{target}", format_, features, target,
                           embedding_dtype=embedding_dtype)  # fmt: skip
        expected_commit = commit_of(source, plain, tiling)
        paths = [f"{tmp_path}/p{target}/{part.path}" for part in expected_commit.parts]
        expected = pa.concat_tables([pq.read_table(path) for path in paths])
        commit = commit_of(source, ours, tiling)
        rows = rows_of(commit, ours)
        assert rows.schema.equals(ours.parts.layout.schema, check_metadata=False)
        assert rows.equals(expected.cast(rows.schema))
        assert rows.num_rows == commit.tiles >= len(KEYS) - 1
        assert (len(commit.parts) > 1) == (target == 1000)
        assert [part.rows for part in commit.parts] == [part.rows for part in expected_commit.parts]
        again = commit_of(
            source, replace(ours, parts=replace(ours.parts, output=f"{tmp_path}/again")), tiling
        )
        assert again.parts == commit.parts


@pytest.mark.parametrize("format_", FORMATS)
def test_the_same_on_s3(format_: Format, source: Path, tmp_path: Path, s3_moto: S3Server) -> None:
    features = ("cls", "tokens") if format_ == "webdataset" else ("cls", "mean")
    local = settings_of(tmp_path, format_, features, 2000)
    url = s3_moto.make_bucket(f"formats-{format_}")
    remote = settings_of(f"{url}/out", format_, features, 2000, storage=Storage(s3_moto.options))
    here, there = commit_of(source, local), commit_of(source, remote)
    assert len(there.parts) > 1
    assert there.parts == here.parts
    assert rows_of(there, remote).equals(rows_of(here, local))
    objects = {f"out/{path}": data for path, data in files_below(tmp_path).items()}
    found = s3_moto.objects(f"formats-{format_}")
    assert set(found) == set(objects)
    assert all(found[n] == objects[n] for n in objects if "/commits/" not in n)


@pytest.mark.parametrize("format_", FORMATS)
def test_columns_may_be_chosen(format_: Format, source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, format_, ("mean", "cls"))
    commit = commit_of(source, settings)
    whole = rows_of(commit, settings)
    parts = settings.parts
    for columns in (["key", "tile_index"], ["cls"], ["bin", "mean", "tile_box"], ["txt"]):
        with open_part(commit.parts[0], parts.output, parts.layout, STORAGE) as opened:
            tables = [opened.batch(number, columns) for number in range(opened.num_batches)]
        assert pa.concat_tables(tables).combine_chunks().equals(whole.select(columns))


@pytest.mark.parametrize("format_", FORMATS)
def test_batches_are_bounded(
    format_: Format, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch never cuts a picture of a tar; in any order they are what they were."""
    monkeypatch.setattr(writers, "ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr(webdataset_format, "BATCH_BYTES", 1500)
    settings = settings_of(tmp_path, format_)
    commit = commit_of(source, settings)
    parts = settings.parts
    with open_part(commit.parts[0], parts.output, parts.layout, STORAGE) as opened:
        assert opened.num_batches > 2
        tables = {n: opened.batch(n) for n in reversed(range(opened.num_batches))}
    whole = pa.concat_tables([tables[n] for n in sorted(tables)]).combine_chunks()
    assert whole.equals(rows_of(commit, settings))
    for table in tables.values():
        counts = dict(
            zip(*(table[n].to_pylist() for n in ("sample_index", "tile_count")), strict=True)
        )
        assert table.num_rows == sum(counts.values())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("features", [("cls",), ("cls", "mean")], ids="+".join)
def test_a_shard_of_rejects_alone(
    format_: Format, features: tuple[str, ...], tmp_path: Path
) -> None:
    source = write_tar(tmp_path / "s.tar", [("0.jpg", b"x"), ("1.txt", b"y")])
    settings = settings_of(tmp_path / "out", format_, features)
    commit = commit_of(source, settings)
    (part,) = commit.parts
    assert (commit.tiles, commit.rejects, part.rows) == (0, 2, 0)
    assert len(part.objects) == (len(features) if format_ == "npy" else 1)
    assert list(part_tables(part, settings.parts.output, settings.parts.layout, STORAGE)) == []


def tars_of(commit: Commit, output: Path) -> list[str]:
    return [str(output / part.path) for part in commit.parts]


def test_tars_have_no_times_no_owners_and_harmless_names(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "out", "webdataset", ("cls", "tokens"))
    commit = commit_of(source, settings)
    (path,) = tars_of(commit, tmp_path / "out")
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
        archive.extractall(tmp_path / "extracted", filter="data")
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert all(entry.isreg() for entry in entries)
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    documents = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    assert documents == [
        "a/b.c/0001", "plain", "käse ü", "_renamed/00000004", "_renamed/00000005",
        "_renamed/00000006", "_renamed/00000007", KEYS[8], "_renamed/00000009",
        "_renamed/00000010",
    ]  # fmt: skip
    assert names[:5] == [
        "a/b.c/0001.json", "a/b.c/0001.0.cls.npy", "a/b.c/0001.0.tokens.npy", *names[3:5]
    ]  # fmt: skip
    assert set(files_below(tmp_path / "extracted")) == set(names)
    document = json.loads((tmp_path / "extracted/_renamed/00000004.json").read_text())
    assert document["key"] == "../../etc/passwd"
    assert document["txt"] == "caption 4 „é“"
    assert document["bin"] is not None


def test_webdataset_and_torch_read_the_tars(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "webdataset", ("cls", "tokens"), 2000)
    commit = commit_of(source, settings)
    paths = tars_of(commit, tmp_path)
    assert len(paths) > 1
    rows = rows_of(commit, settings)
    tokens = feature_values(rows["tokens"], 30).reshape(-1, 5, 6)
    dataset = wds.WebDataset(paths, shardshuffle=False, empty_check=False).decode()
    loader = DataLoader(dataset, batch_size=None, num_workers=0)
    at = 0
    for sample in loader:
        document = sample["json"]
        for tile in range(document["tile_count"]):
            np.testing.assert_array_equal(sample[f"{tile}.tokens.npy"], tokens[at])
            np.testing.assert_array_equal(
                sample[f"{tile}.cls.npy"], rows["cls"][at].values.to_numpy()
            )
            assert document["tile_box"][tile] == rows["tile_box"][at].as_py()
            assert document["key"] == rows["key"][at].as_py()
            at += 1
    assert at == rows.num_rows > 5


def test_one_feature_has_the_plain_names(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "webdataset", ("tokens",))
    commit = commit_of(source, settings)
    first = next(iter(wds.WebDataset(tars_of(commit, tmp_path), shardshuffle=False).decode()))
    assert first["__key__"] == "a/b.c/0001"
    assert first["0.npy"].shape == (5, 6)
    assert first["0.npy"].dtype == np.float16


@pytest.mark.parametrize("features", [("cls",), ("mean", "cls")], ids="+".join)
def test_numpy_and_parquets_readers_open_arrays_and_tables(
    features: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "npy", features, 1000)
    commits = [commit_of(source, settings, shard=shard) for shard in ("b/c", "b.o", "b", "a")]
    rows = {commit.shard: rows_of(commit, settings) for commit in commits}
    tables = sorted((tmp_path / "embeddings/metadata").iterdir())
    assert len(tables) == sum(len(commit.parts) for commit in commits) > 8
    frame = pd.concat([pd.read_parquet(table) for table in tables], ignore_index=True)
    for name in features:
        folder = tmp_path / "embeddings" / (name if len(features) > 1 else "img_emb")
        arrays = [np.load(path, mmap_mode="r") for path in sorted(folder.iterdir())]
        assert [len(a) for a in arrays] == [pq.read_metadata(t).num_rows for t in tables]
        # "b" < "b.o" < "b/c" as they are escaped, each with the rows of its parts
        order = pa.concat_tables([rows[shard] for shard in ("a", "b", "b.o", "b/c")])
        np.testing.assert_array_equal(np.concatenate(arrays), feature_values(order[name], 6))
        assert frame["key"].tolist() == order["key"].to_pylist()
        assert frame["bin"].tolist() == order["bin"].to_pylist()
    counted = duckdb.sql(
        f"select count(*), count(distinct key) from '{tmp_path}/embeddings/metadata/*.parquet'"
    )
    assert counted.fetchall() == [(len(frame), frame["key"].nunique())]
    read = pds.dataset(tmp_path / "embeddings/metadata").to_table()
    assert read.num_rows == len(frame)
    assert not set(features) & set(read.column_names)


def edited_tar(path: Path, edit: Any) -> None:
    """Writes an archive again with other members."""
    with tarfile.open(path) as archive:
        members = [(e.name, archive.extractfile(e).read()) for e in archive]  # type: ignore[union-attr]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in edit(members):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(sink.getvalue())


def without_count(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    name, data = members[0]
    document = json.loads(data)
    del document["tile_count"]
    return [(name, json.dumps(document).encode()), *members[1:]]


TAR_EDITS = {
    "a member is gone": (lambda m: m[:-1], "rows, the commit says"),
    "two are swapped": (lambda m: [m[1], m[0], *m[2:]], "where another is due"),
    "another name": (lambda m: [m[0], (m[1][0] + "x", m[1][1]), *m[2:]], "where another is due"),
    "no JSON": (lambda m: [(m[0][0], b"[1"), *m[1:]], "not what it should be: JSONDecodeError"),
    "a deep one": (
        lambda m: [(m[0][0], b"[" * 100_000), *m[1:]], "not what it should be: RecursionError"
    ),
    "a list": (lambda m: [(m[0][0], b"[1]"), *m[1:]], "not what it should be: TypeError"),
    "a field less": (without_count, "not what it should be: KeyError: 'tile_count'"),
    "a longer array": (
        lambda m: [m[0], (m[1][0], m[1][1] + b"00"), *m[2:]], "not an array of cls"
    ),
    "no array": (lambda m: [m[0], (m[1][0], b"\0" * len(m[1][1])), *m[2:]], "not an array of cls"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAR_EDITS)
def test_a_tar_that_is_not_ours_is_told(what: str, source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "webdataset")
    commit = commit_of(source, settings)
    path = tmp_path / commit.parts[0].path
    edit, says = TAR_EDITS[what]
    edited_tar(path, edit)
    with (
        pytest.raises(PartError, match=says),
        open_local([path], settings.parts.layout, commit.tiles) as opened,
    ):
        [opened.batch(number) for number in range(opened.num_batches)]


def test_an_array_that_is_not_ours_is_told(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "npy")
    commit = commit_of(source, settings)
    array, table = (tmp_path / published.path for published in commit.parts[0].objects)
    layout = settings.parts.layout
    with (
        pytest.raises(PartError, match="1 objects, where 2 are due"),
        open_local([array], layout, commit.tiles),
    ):
        pass
    values = np.load(array)
    for other in (values.astype(np.float32), values[:-1], np.asfortranarray(values)):
        np.save(array, other)
        with (
            pytest.raises(PartError, match="the array of cls is not float16"),
            open_local([array, table], layout, commit.tiles),
        ):
            pass


@pytest.mark.parametrize("format_", FORMATS)
def test_a_part_that_was_not_committed_so_is_not_read(
    format_: Format, source: Path, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, format_)
    commit = commit_of(source, settings)
    parts = settings.parts
    for published in commit.parts[0].objects:
        path = tmp_path / published.path
        data = path.read_bytes()
        flipped = bytes([*data[:-1], data[-1] ^ 1])
        for broken, says in (
            (flipped, "sha256 differs"),
            (data[:-1], "bytes, the commit says"),
            (None, "missing"),
        ):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            with pytest.raises(PartError, match=says):
                list(part_tables(commit.parts[0], parts.output, parts.layout, STORAGE))
            path.write_bytes(data)


@pytest.mark.parametrize("target_part_bytes", [1 << 30, 1000])
@pytest.mark.parametrize("format_", FORMATS)
def test_readers_see_the_same_in_every_format(
    format_: Format, target_part_bytes: int, source: Path, tmp_path: Path
) -> None:
    features = ("cls",) if format_ == "npy" else ("cls", "tokens")
    settings = settings_of(tmp_path / "o", format_, features, target_part_bytes)
    made_by = {"tiling": "dynamic", "thumbnail": True, "embedding_dtype": "float16",
               "image_key": list(IMAGE_KEY), "carry": list(CARRY), "format": format_}  # fmt: skip
    output = settings.parts.output
    dataset = Dataset.describe("m", None, "w" * 64, made_by, shapes(features), "0.1.0")
    open_output(output, dataset, STORAGE)
    rows = rows_of(commit_of(source, settings), settings)
    found = list(pictures(output))
    assert len(found) == len(KEYS) - 1
    assert [p.key for p in found] == [k for k in KEYS if k != "a/b.c/0002"]
    for name in features:
        values = np.concatenate([p.features[name].reshape(len(p.tile_boxes), -1) for p in found])
        np.testing.assert_array_equal(values, feature_values(rows[name], values.shape[1]))
    for name in CARRY:
        carried = rows.filter(pc.equal(rows["tile_index"], 0))[name].to_pylist()
        assert [p.carried[name] for p in found] == carried
    firsts = np.concatenate([run.values for run in vectors(output, "cls", "first")])
    np.testing.assert_array_equal(firsts, [p.features["cls"][0].astype(np.float32) for p in found])
    if format_ != "parquet":
        with pytest.raises(UserError, match="no Parquet"):
            dataset_of(output)
    if "tokens" in features:
        with pytest.raises(UserError, match="no vector"):
            next(vectors(output, "tokens", "first"))


@pytest.mark.parametrize("features", [("cls",), ("mean", "cls"), ("tokens",)], ids="+".join)
def test_a_cut_part_is_no_larger_than_asked(
    features: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    """In tars small values take as much for their headers as for themselves."""
    members = [(f"{i:03}.jpg", picture(40, 50, i)) for i in range(120)]
    path = write_tar(tmp_path / "many.tar", members)
    target = 120_000
    settings = settings_of(tmp_path / "o", "webdataset", features, target)
    sizes = [part.bytes for part in commit_of(path, settings, CENTER).parts]
    assert len(sizes) > 1
    assert max(sizes) <= target + tarfile.RECORDSIZE  # to which the end is filled up
    assert min(sizes[:-1]) > target // 2
