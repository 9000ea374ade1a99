"""A complete shard becomes output objects and, last, its commit; the same input the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from pipeline import local_files, writers
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, Embedder, commit_url
from pipeline.embedding import part_folder
from pipeline.lease import LeaseLostError, lease_url, mark_url
from pipeline.ledger import CompleteShard
from pipeline.records import REJECT_SCHEMA, Head, Part, Shard, Work, embedding_schema
from pipeline.samples import ReadSettings
from pipeline.storage import Storage
from pipeline.vectors import feature_values
from pipeline.writers import FinalizeSettings, HashingSink, cut_parts, finalize_shard
from tests.builders import files_below, samples, write_tar
from tests.stages import IMAGE_KEY, STORAGE, TILING, WIDTH, compute_shard, encode, part_settings

BAD = 2  # sample_index of what cannot be decoded
CARRY = ("txt",)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = samples(9, seed=3)
    members[3 * BAD] = (members[3 * BAD][0], b"no picture")
    return write_tar(tmp_path_factory.mktemp("in") / "s.tar", members)


def settings_of(output: Path, target_part_bytes: int = 1 << 30, **options: Any) -> FinalizeSettings:
    return FinalizeSettings(
        part_settings(output, carry=CARRY, **options), "f" * 64, target_part_bytes
    )


def compute(source: Path, settings: FinalizeSettings, shard: str = "s") -> CompleteShard:
    return compute_shard(
        Shard(str(source), shard),
        ReadSettings(STORAGE, IMAGE_KEY, CARRY),
        TileSettings(TILING, CARRY, 60.0, chunk_tiles=6),
        encode,
        settings.parts,
    )


def test_a_run_that_lost_its_output_commits_nothing(source: Path, tmp_path: Path) -> None:
    """Its driver is dead or frozen: the task finds out itself, and the successor's word counts."""
    settings = replace(settings_of(tmp_path / "out"), lease=3)
    complete = compute(source, settings)
    output = settings.parts.output
    with pytest.raises(LeaseLostError, match="lease is gone"):
        finalize_shard(complete, settings)
    STORAGE.publish_bytes(mark_url(output, settings.parts.run), b"")
    STORAGE.publish_bytes(lease_url(output, 4), b"")
    with pytest.raises(LeaseLostError, match="taken it over"):
        finalize_shard(complete, settings)
    assert not STORAGE.exists(commit_url(output, "s"))
    left = [name for name in STORAGE.iter_files(output) if not name.startswith("_runs/")]
    assert left == [], "not an object either: a successor's may have its name"
    STORAGE.remove(lease_url(output, 4))
    assert finalize_shard(complete, settings).samples == 9


def finalize(source: Path, output: Path, shard: str = "s", **options: Any) -> Commit:
    settings = settings_of(output, **options)
    return finalize_shard(compute(source, settings, shard), settings)


def test_what_is_published_and_what_the_commit_says(source: Path, tmp_path: Path) -> None:
    commit = finalize(source, tmp_path)
    files = files_below(tmp_path)
    assert set(files) == {"embeddings/s.parquet", "rejects/s.parquet", "commits/s.json"}
    assert files["commits/s.json"] == commit.dump()
    (part,) = commit.parts
    assert commit.rejects_part is not None
    for found in (part, commit.rejects_part):
        assert found.bytes == len(files[found.path])
        assert found.sha256 == hashlib.sha256(files[found.path]).hexdigest()
    table = pq.read_table(io.BytesIO(files["embeddings/s.parquet"]))
    assert table.schema.equals(embedding_schema({"cls": WIDTH}, "float16", CARRY))
    assert table.schema.metadata[b"tessera.fingerprint"] == b"f" * 64
    assert part.rows == commit.tiles == table.num_rows
    assert list(dict.fromkeys(table["sample_index"].to_pylist())) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert table["txt"][0].as_py() == "caption 0000"
    rejects = pq.read_table(io.BytesIO(files["rejects/s.parquet"]))
    assert rejects.schema.equals(REJECT_SCHEMA)
    assert rejects["sample_index"].to_pylist() == [BAD]
    assert (commit.samples, commit.rejects, commit.rejects_part.rows) == (9, 1, 1)
    assert commit.source.size == source.stat().st_size
    assert commit.seconds.tile > 0
    assert commit.truncated_at is None


def test_a_task_that_is_killed_leaves_nothing_on_its_node(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is about to be published has no name of its own in the node's temporary folder."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(node))
    seen: list[tuple[int, list[Path]]] = []

    class Watching(Storage):
        def publish_file(self, url: str, local: Path) -> None:
            seen.append((local.stat().st_size, list(node.iterdir())))
            super().publish_file(url, local)

    settings = settings_of(tmp_path / "out")
    settings = replace(settings, parts=replace(settings.parts, storage=Watching()))
    commit = finalize_shard(compute(source, settings), settings)
    assert commit.rejects_part is not None
    assert seen == [(commit.parts[0].bytes, []), (commit.rejects_part.bytes, [])]


@pytest.mark.skipif(sys.platform != "linux", reason="O_TMPFILE")
def test_a_local_output_is_not_copied_once_more(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inodes: dict[str, int] = {}

    class Watching(Storage):
        def publish_file(self, url: str, local: Path) -> None:
            inodes[url] = local.stat().st_ino
            super().publish_file(url, local)

    previous = os.umask(0o027)
    try:
        settings = settings_of(tmp_path)
        settings = replace(settings, parts=replace(settings.parts, storage=Watching()))
        finalize_shard(compute(source, settings), settings)
        assert len(inodes) == 2
        for url, inode in inodes.items():
            found = Path(url).stat()
            assert (found.st_ino, found.st_nlink, found.st_mode & 0o777) == (inode, 1, 0o640)
        whole = files_below(tmp_path)
        monkeypatch.setattr(local_files, "_named", lambda descriptor, name: False)
        finalize_shard(compute(source, settings), settings)
    finally:
        os.umask(previous)
    for url, inode in inodes.items():
        assert Path(url).stat().st_ino != inode  # copied, where no name can be given
        name = str(Path(url).relative_to(tmp_path))
        assert files_below(tmp_path)[name] == whole[name]


def test_values_are_those_of_the_encoder_in_the_tars_order(source: Path, tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def remember(tiles: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(encode(tiles)["cls"])
        return encode(tiles)

    settings = settings_of(tmp_path)
    shard = compute_shard(
        Shard(str(source), "s"),
        ReadSettings(STORAGE, IMAGE_KEY, CARRY),
        TileSettings(TILING, CARRY, 60.0, chunk_tiles=6),
        remember,
        settings.parts,
    )
    assert len(seen) > 2
    finalize_shard(shard, settings)
    stored = feature_values(pq.read_table(tmp_path / "embeddings/s.parquet")["cls"], WIDTH)
    np.testing.assert_array_equal(stored, np.concatenate(seen).astype(np.float16))


def test_a_commit_counts_tiles_by_picture_and_rejects_by_code(source: Path, tmp_path: Path) -> None:
    commit = finalize(source, tmp_path)
    rows = pq.read_table(tmp_path / "embeddings/s.parquet").to_pylist()
    pictures = [row["tile_count"] for row in rows if row["tile_index"] == 0]
    assert commit.tile_counts == {count: pictures.count(count) for count in sorted({*pictures})}
    assert len(commit.tile_counts) > 1
    assert sum(tiles * times for tiles, times in commit.tile_counts.items()) == commit.tiles
    assert commit.reject_codes == {"decode/unidentified": 1}


def test_a_commit_names_the_replicas_that_took_part(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    shard = compute(source, settings)
    works = [Work("n2", "b", 6, 1.0, 9.0), Work("n1", "a", 5, 0.5, 9.0), Work("n2", "b", 4, 2.0, 9)]
    assert len(shard.parts) > len(works)
    parts = [
        replace(part, head=replace(part.head, work=works[at] if at < len(works) else None))
        for at, part in enumerate(shard.parts)
    ]
    commit = finalize_shard(replace(shard, parts=tuple(parts)), settings)
    assert commit.replicas == (
        Embedder(node="n1", replica="a", tiles=5, seconds=0.5),
        Embedder(node="n2", replica="b", tiles=10, seconds=3.0),
    )
    stored = (tmp_path / "commits/s.json").read_bytes()
    assert Commit.parse(stored, "s") == commit


def test_finalized_twice_the_bytes_are_the_same(source: Path, tmp_path: Path) -> None:
    first = finalize(source, tmp_path / "a", run="run-1")
    second = finalize(source, tmp_path / "b", run="run-2")
    one, two = files_below(tmp_path / "a"), files_below(tmp_path / "b")
    del one["commits/s.json"], two["commits/s.json"]
    assert one == two
    same = {"seconds": first.seconds, "committed_at": first.committed_at}
    assert second.model_copy(update=same) == first


def test_finalized_over_what_a_dead_run_published(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    shard = compute(source, settings)
    whole = finalize(source, tmp_path / "other")
    STORAGE.publish_bytes(f"{tmp_path}/embeddings/s.parquet", b"half of it")
    commit = finalize_shard(shard, settings)
    assert commit.parts == whole.parts
    assert (tmp_path / "embeddings/s.parquet").stat().st_size == commit.parts[0].bytes


@pytest.mark.parametrize("target_part_bytes", [1, 1000, 2000])
def test_a_large_output_is_cut_and_loses_nothing(
    target_part_bytes: int, source: Path, tmp_path: Path
) -> None:
    whole = finalize(source, tmp_path / "whole")
    commit = finalize(source, tmp_path / "cut", target_part_bytes=target_part_bytes)
    paths = [part.path for part in commit.parts]
    assert len(paths) > 2
    assert paths == [f"embeddings/s-{number:05d}.parquet" for number in range(len(paths))]
    assert sum(part.rows for part in commit.parts) == commit.tiles == whole.tiles
    tables = [pq.read_table(tmp_path / "cut" / path) for path in paths]
    uncut = pq.read_table(tmp_path / "whole/embeddings/s.parquet")
    assert pa.concat_tables(tables).equals(uncut)
    again = finalize(source, tmp_path / "again", target_part_bytes=target_part_bytes)
    assert again.parts == commit.parts
    read = pds.dataset(tmp_path / "cut/embeddings", format="parquet").to_table()
    assert read.sort_by([("sample_index", "ascending"), ("tile_index", "ascending")]).equals(uncut)


def test_an_output_of_just_the_target_is_not_cut(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    shard = compute(source, settings)
    size = sum(part.num_bytes for part in shard.parts)
    commit = finalize_shard(shard, replace(settings, target_part_bytes=size))
    assert [part.path for part in commit.parts] == ["embeddings/s.parquet"]
    smaller = finalize(source, tmp_path / "b", target_part_bytes=size - 1)
    assert len(smaller.parts) == 2


def test_row_groups_are_bounded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize(source, tmp_path / "one")
    monkeypatch.setattr(writers, "ROW_GROUP_BYTES", 1000)
    finalize(source, tmp_path / "many")
    one, many = (pq.ParquetFile(tmp_path / n / "embeddings/s.parquet") for n in ("one", "many"))
    assert one.num_row_groups == 1
    assert many.num_row_groups > 2
    assert one.read().equals(many.read())


def test_nested_shards_do_not_disturb_each_other(source: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    outer, inner = compute(source, settings, "a"), compute(source, settings, "a/b")
    first = finalize_shard(outer, settings)
    assert (tmp_path / "_runs/run/parts" / part_folder("a/b")).is_dir()
    second = finalize_shard(inner, settings)
    assert first.tiles == second.tiles > 0
    assert {name for name in files_below(tmp_path) if "_runs" not in name} == {
        *("commits/a.json", "embeddings/a.parquet", "rejects/a.parquet"),
        *("commits/a/b.json", "embeddings/a/b.parquet", "rejects/a/b.parquet"),
    }
    assert not any("_runs" in name for name in files_below(tmp_path))


def test_a_shard_of_rejects_alone_has_an_empty_part(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", [("0.jpg", b"x"), ("1.txt", b"y")])
    commit = finalize(source, tmp_path / "out")
    assert (commit.samples, commit.tiles, commit.rejects) == (2, 0, 2)
    table = pq.read_table(tmp_path / "out/embeddings/s.parquet")
    assert table.num_rows == 0
    assert table.schema.equals(embedding_schema({"cls": WIDTH}, "float16", CARRY))
    rejects = pq.read_table(tmp_path / "out/rejects/s.parquet")
    assert rejects["sample_index"].to_pylist() == [0, 1]


def test_a_shard_without_rejects_has_no_rejects_file(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", samples(2))
    commit = finalize(source, tmp_path / "out")
    assert commit.rejects_part is None
    assert not (tmp_path / "out/rejects").exists()


def test_the_commit_comes_last_and_only_after_all_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage that fails at the rejects leaves no commit."""
    settings = settings_of(tmp_path)
    shard = compute(source, settings)
    publish = Storage.publish_file
    published = []

    def fail_at_rejects(self: Storage, url: str, local: Path) -> None:
        published.append(url.removeprefix(f"{tmp_path}/"))
        if "/rejects/" in url:
            raise OSError("no space left")
        publish(self, url, local)

    monkeypatch.setattr(Storage, "publish_file", fail_at_rejects)
    with pytest.raises(OSError, match="no space left"):
        finalize_shard(shard, settings)
    assert published == ["embeddings/s.parquet", "rejects/s.parquet"]
    assert not STORAGE.exists(commit_url(str(tmp_path), "s"))
    monkeypatch.undo()
    assert finalize_shard(shard, settings).rejects == 1  # the parts are still there


def test_embeddings_carry_no_statistics_and_keys_do(source: Path, tmp_path: Path) -> None:
    finalize(source, tmp_path)
    columns = pq.ParquetFile(tmp_path / "embeddings/s.parquet").metadata.row_group(0)
    found = {
        columns.column(i).path_in_schema: columns.column(i) for i in range(columns.num_columns)
    }
    assert not found["cls.list.element"].is_stats_set
    assert found["cls.list.element"].compression == "UNCOMPRESSED"
    assert found["key"].statistics.min == "0000"
    assert found["sample_index"].compression == "ZSTD"


def test_a_hashing_sink_counts_and_digests() -> None:
    target = io.BytesIO()
    sink = HashingSink(target)
    for piece in (b"ab", b"", b"c" * 1000):
        sink.write(piece)
    assert target.getvalue() == b"ab" + b"c" * 1000
    assert sink.num_bytes == sink.tell() == 1002
    assert sink.digest.hexdigest() == hashlib.sha256(target.getvalue()).hexdigest()


def test_parts_without_rows_make_no_output_of_their_own() -> None:
    def part(number: int, tiles: int) -> Part:
        return Part(Head("s", "u", number), f"{number}", 1, tiles, {}, num_bytes=100)

    parts = [part(number, tiles) for number, tiles in enumerate([0, 3, 0, 2, 0])]
    assert cut_parts(parts, 1) == [parts[:3], parts[3:]]
    assert cut_parts(parts, 1000) == [parts]
    assert cut_parts(parts[:1], 1) == [parts[:1]]
