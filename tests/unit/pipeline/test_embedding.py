"""A chunk gets its values and becomes a part; what cannot be stored truly is a reject."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipeline import retries
from pipeline.chunks import Chunk
from pipeline.embedding import (
    Embedded,
    embed_chunk,
    narrow,
    part_folder,
    read_part,
    reject_chunk,
    write_part,
)
from pipeline.records import Part
from pipeline.storage import Storage
from pipeline.vectors import feature_values
from tests.builders import picture, write_tar
from tests.stages import WIDTH, encode, part_settings, tile_shard

Values = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def chunk(tmp_path: Path) -> Chunk:
    """Pictures of 1, 3 and 1 tiles, and a reject."""
    members = [
        ("0.jpg", picture(28, 28, 0)),
        ("1.jpg", picture(112, 56, 1)),
        ("2.jpg", picture(28, 28, 2)),
        ("3.jpg", b"no picture"),
    ]
    (only,) = tile_shard(write_tar(tmp_path / "s.tar", members))
    assert only.rows["sample_index"].to_pylist() == [0, 1, 1, 1, 2]
    return only


def spoiled(row: int, value: float, feature: str = "cls") -> Values:
    """What an encoder might give for the five tiles, with one value of its own."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(5, WIDTH)).astype(np.float32) for name in ("cls", "mean")}
    values[feature][row, 2] = value
    return values


def codes(rejects: pa.Table) -> list[tuple[int, str, str]]:
    return [(r["sample_index"], r["stage"], r["error"]) for r in rejects.to_pylist()]


BEFORE = (3, "decode", "unidentified")
BOTH = {"cls": WIDTH, "mean": WIDTH}


def test_values_stand_beside_their_tiles(chunk: Chunk, tmp_path: Path) -> None:
    settings = part_settings(tmp_path, {"mean": WIDTH, "cls": WIDTH}, "float32")
    embedded = embed_chunk(chunk, encode, settings)
    for name in ("mean", "cls"):
        stored = feature_values(embedded.rows[name], WIDTH)
        np.testing.assert_array_equal(stored, encode(chunk.tiles)[name])
    assert embedded.rows.column_names[-2:] == ["mean", "cls"]
    assert codes(embedded.rejects) == [BEFORE]
    assert embedded.head.seconds.embed > 0
    again = Embedded.load(embedded.dump())
    assert again.head == embedded.head
    assert again.rows.equals(embedded.rows)
    assert again.rejects.equals(embedded.rejects)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_a_value_that_is_not_finite_rejects_its_picture(
    value: float, feature: str, chunk: Chunk, tmp_path: Path
) -> None:
    settings = part_settings(tmp_path, BOTH)
    embedded = embed_chunk(chunk, lambda tiles: spoiled(2, value, feature), settings)
    assert embedded.rows["sample_index"].to_pylist() == [0, 2]
    assert codes(embedded.rejects) == [BEFORE, (1, "embed", "non-finite")]


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_a_value_that_float16_cannot_hold_rejects_its_picture(
    feature: str, chunk: Chunk, tmp_path: Path
) -> None:
    settings = part_settings(tmp_path, BOTH)
    embedded = embed_chunk(chunk, lambda tiles: spoiled(0, 65_520, feature), settings)
    part = write_part(embedded, settings)
    rows, rejects = read_part(part, settings)
    assert rows["sample_index"].to_pylist() == [1, 1, 1, 2]
    assert codes(rejects) == [BEFORE, (0, "write", "overflow")]
    assert part.rejects == {"decode/unidentified": 1, "write/overflow": 1}
    assert (part.samples, part.tiles) == (4, 4)


def test_the_largest_float16_is_kept_and_float32_holds_more(chunk: Chunk, tmp_path: Path) -> None:
    for dtype, value in (("float16", 65_504.0), ("float32", 1e30)):
        settings = part_settings(tmp_path, BOTH, dtype)
        embedded = embed_chunk(chunk, lambda tiles, v=value: spoiled(0, v), settings)
        rows, rejects = read_part(write_part(embedded, settings), settings)
        stored = feature_values(rows["cls"], WIDTH)
        assert stored.dtype == dtype
        assert stored[0, 2] == np.float32(value)
        assert codes(rejects) == [BEFORE]


def test_a_part_holds_the_values_in_their_final_type(chunk: Chunk, tmp_path: Path) -> None:
    settings = part_settings(tmp_path, BOTH)
    part = write_part(embed_chunk(chunk, encode, settings), settings)
    rows, _ = read_part(part, settings)
    expected = encode(chunk.tiles)["mean"].astype(np.float16)
    np.testing.assert_array_equal(feature_values(rows["mean"], WIDTH), expected)
    assert (part.samples, part.tiles, part.failure) == (4, 5, None)
    written = Path(settings.folder) / part.file
    assert part.num_bytes == written.stat().st_size
    assert part.head.end == chunk.head.end
    again = write_part(embed_chunk(chunk, encode, settings), settings)
    assert again.file == part.file  # a task that Ray repeats writes over its own file


def test_a_part_that_is_not_what_was_written_is_an_error(
    chunk: Chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)
    settings = part_settings(tmp_path, BOTH)
    part = write_part(embed_chunk(chunk, encode, settings), settings)
    written = Path(settings.folder) / part.file
    whole = written.read_bytes()
    assert part.crc32 == zlib.crc32(whole)
    assert Part.load(part.dump()).crc32 == part.crc32
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for other in (bytes(damaged), whole[:-1], b""):
        written.write_bytes(other)
        with pytest.raises(OSError, match=r"cannot read .*DamagedObjectError: its crc32 is not"):
            read_part(part, settings)


def test_a_chunk_that_is_given_up_becomes_rejects(chunk: Chunk, tmp_path: Path) -> None:
    settings = part_settings(tmp_path, BOTH)
    embedded = reject_chunk(chunk, settings, "3 replicas died")
    assert embedded.rows.num_rows == 0
    assert codes(embedded.rejects) == [
        BEFORE,
        *((index, "embed", "replica-died") for index in (0, 1, 2)),
    ]
    assert write_part(embedded, settings).samples == 4


def test_a_chunk_without_tiles_is_a_part_too(tmp_path: Path) -> None:
    (chunk,) = tile_shard(write_tar(tmp_path / "s.tar", [("0.jpg", b"x")]))
    settings = part_settings(tmp_path)
    rows, rejects = read_part(write_part(embed_chunk(chunk, encode, settings), settings), settings)
    assert rows.num_rows == 0
    assert codes(rejects) == [(0, "decode", "unidentified")]


def test_a_storage_that_fails_is_told_in_the_part(
    chunk: Chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Storage, url: str, data: bytes) -> None:
        raise PermissionError(f"no right to write {url}")

    monkeypatch.setattr(Storage, "publish_bytes", refuse)
    settings = part_settings(tmp_path)
    part = write_part(embed_chunk(chunk, encode, settings), settings)
    assert str(part.failure).startswith("PermissionError: no right to write")


def test_part_folders_of_nested_shards_lie_side_by_side() -> None:
    names = [part_folder(shard) for shard in ("a", "a/b", "a/b/c", "a-00000")]
    assert len(set(names)) == 4
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("given", ["float32", "float16"])
def test_narrowing_tells_what_is_not_finite_from_what_does_not_fit(given: str) -> None:
    """A picture of each kind; float16 comes with the marks of the encoder."""
    large = 65_520 if given == "float32" else np.inf
    broken = np.inf if given == "float32" else np.nan
    values = np.ones((4, 3), given)
    values[1, 2], values[2, 0], values[3, 1] = large, broken, np.nan
    narrowed, finite, fitting = narrow(values, "float16")
    assert narrowed.dtype == np.float16
    assert finite.tolist() == [True, True, False, False]
    assert fitting.tolist() == [True, False, False, False]
    if given == "float32":
        _, finite, fitting = narrow(values, "float32")
        assert finite.tolist() == fitting.tolist() == [True, True, False, False]


def test_a_picture_that_is_both_is_one_reject(chunk: Chunk, tmp_path: Path) -> None:
    """Tile 1 of it is too large, tile 2 not finite; another picture is too large."""
    settings = part_settings(tmp_path, BOTH)
    values = spoiled(1, 65_520)
    values["mean"][2, 0], values["mean"][4, 0] = np.nan, 70_000
    embedded = embed_chunk(chunk, lambda tiles: values, settings)
    assert embedded.rows["sample_index"].to_pylist() == [0]
    assert codes(embedded.rejects) == [
        BEFORE, (1, "embed", "non-finite"), (2, "write", "overflow")
    ]  # fmt: skip
    assert write_part(embedded, settings).samples == 4
