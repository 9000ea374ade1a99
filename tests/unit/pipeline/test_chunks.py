"""Chunks: whole pictures in order, at boundaries that the headers alone decide."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline import samples as samples_module
from pipeline.chunks import CHUNK_BYTES, Chunk, chunk_tiles
from pipeline.layout import Layout
from pipeline.tiling import cut_tiles, picture_size, plan_tiles
from tests.builders import picture, write_tar
from tests.stages import TILING, tile_shard

SIZES = [(60, 60), (120, 30), (30, 120), (28, 28), (90, 60), (200, 100), (61, 59), (40, 150)]
IMAGES = [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


def write_shard(folder: Path, images: list[bytes]) -> Path:
    members = []
    for index, image in enumerate(images):
        members += [(f"{index:03}.jpg", image), (f"{index:03}.txt", f"caption {index}".encode())]
    return write_tar(folder / "s.tar", members)


def contents(chunks: list[Chunk]) -> list[tuple[list[int], list[int]]]:
    """(embedded, rejected) sample indices of each chunk."""
    columns = [
        (chunk.rows["sample_index"].to_pylist(), chunk.rejects["sample_index"].to_pylist())
        for chunk in chunks
    ]
    return [(list(dict.fromkeys(rows)), rejects) for rows, rejects in columns]


def test_a_row_for_each_tile_says_where_it_comes_from(tmp_path: Path) -> None:
    chunks = tile_shard(write_shard(tmp_path, IMAGES), carry=("txt",))
    rows = [row for chunk in chunks for row in chunk.rows.to_pylist()]
    tiles = np.concatenate([chunk.tiles for chunk in chunks])
    at = 0
    for index, image in enumerate(IMAGES):
        plan = plan_tiles(*picture_size(image), TILING)
        expected = np.empty((plan.tile_count, 28, 28, 3), np.uint8)
        cut_tiles(image, TILING, plan, expected)
        np.testing.assert_array_equal(tiles[at : at + plan.tile_count], expected)
        for tile, row in enumerate(rows[at : at + plan.tile_count]):
            assert row == {
                "key": f"{index:03}",
                "sample_index": index,
                "tile_index": tile,
                "tile_count": plan.tile_count,
                "is_thumbnail": plan.tile_count > 1 and tile == plan.tile_count - 1,
                "tile_box": pytest.approx(plan.boxes[tile]),
                "width": SIZES[index][0],
                "height": SIZES[index][1],
                "image_sha256": hashlib.sha256(image).digest(),
                "txt": f"caption {index}",
            }
        at += plan.tile_count
    assert at == len(rows) == len(tiles)
    assert at > 2 * len(IMAGES)  # most are cut into several tiles


@pytest.mark.parametrize("chunk_tiles", [1, 5, 8, 1000])
def test_chunks_hold_whole_pictures_up_to_their_size(chunk_tiles: int, tmp_path: Path) -> None:
    chunks = tile_shard(write_shard(tmp_path, IMAGES), chunk_tiles)
    embedded = [indices for indices, _ in contents(chunks)]
    assert [index for indices in embedded for index in indices] == list(range(len(IMAGES)))
    counts = [plan_tiles(*size, TILING).tile_count for size in SIZES]
    for chunk, indices in zip(chunks, embedded, strict=True):
        assert len(chunk.tiles) == sum(counts[index] for index in indices)
        assert len(chunk.tiles) <= chunk_tiles or len(indices) == 1
    assert [c.head.chunk for c in chunks] == list(range(len(chunks)))
    assert [c.head.last_chunk for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [c.head.end is not None for c in chunks] == [c.head.last_chunk for c in chunks]


def test_a_picture_that_fails_moves_no_other_into_another_chunk(tmp_path: Path) -> None:
    sound = tile_shard(write_shard(tmp_path / "a", IMAGES), chunk_tiles=8)
    cut = {index: IMAGES[index][:-60] for index in (1, 4)}  # their headers are whole
    broken = [cut.get(index, image) for index, image in enumerate(IMAGES)]
    chunks = tile_shard(write_shard(tmp_path / "b", broken), chunk_tiles=8)
    assert len(sound) > 2
    assert [sorted(rows + rejects) for rows, rejects in contents(chunks)] == [
        rows for rows, _ in contents(sound)
    ]
    assert [index for _, rejects in contents(chunks) for index in rejects] == [1, 4]
    assert [len(chunk.tiles) for chunk in chunks] == [chunk.rows.num_rows for chunk in chunks]
    rejects = [row for chunk in chunks for row in chunk.rejects.to_pylist()]
    assert {(r["stage"], r["error"], r["member"]) for r in rejects} == {
        ("decode", "truncated", "001.jpg"),
        ("decode", "truncated", "004.jpg"),
    }


def test_two_runs_give_the_same_chunks(tmp_path: Path) -> None:
    images = [*IMAGES[:3], b"no picture", *IMAGES[3:]]
    path = write_shard(tmp_path, images)
    for first, second in zip(tile_shard(path), tile_shard(path), strict=True):
        assert first.rows.equals(second.rows)
        assert first.rejects.equals(second.rejects)
        np.testing.assert_array_equal(first.tiles, second.tiles)
        assert first.head.chunk_id == second.head.chunk_id


def test_every_group_gives_a_last_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where no picture of it can be read, and where the shard is empty."""
    monkeypatch.setattr(samples_module, "GROUP_SAMPLES", 2)
    path = write_shard(tmp_path, [b"x", b"y", IMAGES[0], IMAGES[1], b"z"])
    chunks = tile_shard(path, chunk_tiles=1)
    assert [(c.head.group, c.head.chunk, c.head.last_chunk) for c in chunks] == [
        (0, 0, True),
        (1, 0, False),
        (1, 1, True),
        (2, 0, True),
    ]
    assert [rejects for _, rejects in contents(chunks)] == [[0, 1], [], [], [4]]
    assert chunks[0].tiles.shape == (0, 28, 28, 3)
    (only,) = tile_shard(write_shard(tmp_path / "empty", []))
    assert only.head.last_chunk
    assert only.head.end is not None
    assert len(only.tiles) == only.rows.num_rows == 0


def test_rejects_of_reading_come_along_once(tmp_path: Path) -> None:
    members = [("0.txt", b"x"), ("1.jpg", IMAGES[0]), ("2.jpg", IMAGES[1]), ("3.jpg", IMAGES[2])]
    chunks = tile_shard(write_tar(tmp_path / "s.tar", members), chunk_tiles=1)
    assert [rejects for _, rejects in contents(chunks)] == [[0], [], []]
    assert chunks[0].head.seconds.read > 0
    assert [c.head.seconds.read for c in chunks[1:]] == [0, 0]


def test_a_picture_that_takes_too_long_is_a_reject(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGPROF)
    chunks = tile_shard(write_shard(tmp_path, [picture(1500, 1500)]), deadline_seconds=1e-4)
    (row,) = chunks[0].rejects.to_pylist()
    assert (row["stage"], row["error"]) == ("decode", "deadline")
    assert "0.0001 s" in row["message"]
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGPROF) == before


def test_a_chunk_survives_its_way_as_a_row(tmp_path: Path) -> None:
    chunk = tile_shard(write_shard(tmp_path, [IMAGES[0], b"x"]), carry=("txt",))[0]
    again = Chunk.load(chunk.dump())
    assert again.head == chunk.head
    assert again.rows.equals(chunk.rows)
    assert again.rejects.equals(chunk.rejects)
    np.testing.assert_array_equal(again.tiles, chunk.tiles)


def test_chunks_of_tokens_are_bounded_in_bytes() -> None:
    """6.56 MB a tile of the 6B in float16; vectors leave the number as it is."""
    tokens = Layout("webdataset", {"tokens": (1025, 3200)}, "float16", ()).tile_bytes
    both = Layout("parquet", {"cls": 3200, "mean": 3200}, "float32", ()).tile_bytes
    assert (tokens, both) == (1025 * 3200 * 2, 2 * 3200 * 4)
    assert [chunk_tiles(most, both, device) for most, device in ((32, "cpu"), (128, "cuda"))] == [
        32,
        128,
    ]
    assert [chunk_tiles(most, tokens, device) for most, device in ((32, "cpu"), (128, "cuda"))] == [
        10,
        20,
    ]
    assert chunk_tiles(32, CHUNK_BYTES["cpu"] + 1, "cpu") == 1  # never none
