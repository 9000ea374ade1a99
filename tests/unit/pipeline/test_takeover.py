"""What is taken over equals what would be computed; what cannot be trusted is computed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import samples as samples_module
from pipeline import webdataset_format, writers
from pipeline.chunks import Chunk, TileSettings
from pipeline.commits import Commit, commit_url
from pipeline.embedding import reject_chunk
from pipeline.formats import part_tables
from pipeline.records import Head, Part, Shape, Shard
from pipeline.replaced import mark_of
from pipeline.samples import ReadSettings
from pipeline.takeover import committed_rows, with_known
from pipeline.writers import FinalizeSettings, finalize_shard
from tests.builders import picture, write_tar
from tests.stages import (
    IMAGE_KEY,
    SHAPES,
    STORAGE,
    TILING,
    WIDTH,
    compute_shard,
    encode_all,
    part_settings,
    tile_shard,
)

BOTH = {"cls": WIDTH, "mean": WIDTH}
CARRY = ("txt",)
IMAGES = [
    picture(40 + 37 * (seed % 5), 40 + 53 * (seed % 3), seed) for seed in range(24)
]  # of 1 to 5 tiles
BAD = b"no picture"


def write_shard(path: Path, images: Sequence[bytes], word: str = "caption") -> Path:
    members = []
    for index, image in enumerate(images):
        members += [(f"{index:03}.jpg", image), (f"{index:03}.txt", f"{word} {index}".encode())]
    return write_tar(path, members)


class Counting:
    """An encoder that knows how many tiles it was given, and refuses none at all."""

    def __init__(self) -> None:
        self.tiles = 0

    def __call__(self, tiles: np.ndarray) -> dict[str, np.ndarray]:
        assert len(tiles), "a call for nothing"
        self.tiles += len(tiles)
        return encode_all(tiles)


def settings_of(
    output: Path,
    embedding_dtype: str = "float16",
    features: Mapping[str, Shape] = BOTH,
    **options: Any,
) -> FinalizeSettings:
    parts = part_settings(output, features, embedding_dtype, CARRY, **options)
    return FinalizeSettings(parts, "f" * 64, 1 << 30)


def computed(
    source: Path,
    settings: FinalizeSettings,
    before: Commit | None = None,
    chunk_tiles: int = 6,
    replaced_samples: int | None = None,
) -> tuple[Commit, int]:
    """The commit of a shard, and the number of tiles that went to the encoder."""
    if before is not None:
        STORAGE.publish_bytes(commit_url(settings.parts.output, "s"), before.dump())
    shard = Shard(str(source), "s", "" if before is None else mark_of(before))
    counting = Counting()
    complete = compute_shard(
        shard,
        ReadSettings(STORAGE, IMAGE_KEY, CARRY, replaced_samples=replaced_samples),
        TileSettings(TILING, CARRY, 60.0, chunk_tiles),
        counting,
        settings.parts,
    )
    return finalize_shard(complete, settings, before), counting.tiles


def read_rows(commit: Commit, settings: FinalizeSettings) -> pa.Table:
    parts = settings.parts
    tables = [
        table
        for part in commit.parts
        for table in part_tables(part, parts.output, parts.layout, STORAGE)
    ]
    return pa.concat_tables(tables).combine_chunks()


def rows_of(output: Path, commit: Commit) -> pa.Table:
    return pa.concat_tables([pq.read_table(output / part.path) for part in commit.parts])


def variants(rng: random.Random) -> list[bytes]:
    """The pictures of a shard after a change: some gone, some new, some moved, some twice."""
    images = [image for image in IMAGES if rng.random() < 0.8]
    for _ in range(rng.randrange(4)):
        images.insert(rng.randrange(len(images) + 1), picture(90, 60, rng.randrange(100, 200)))
    for _ in range(rng.randrange(3)):
        images.insert(rng.randrange(len(images) + 1), rng.choice(IMAGES))
    if rng.random() < 0.5:
        images.insert(rng.randrange(len(images) + 1), BAD)
    if rng.random() < 0.3:
        rng.shuffle(images)
    return images


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_a_shard_that_is_computed_whole(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(samples_module, "GROUP_SAMPLES", rng.choice([3, 7, 128]))
    monkeypatch.setattr(writers, "ROW_GROUP_BYTES", rng.choice([500, 4000, 1 << 20]))
    dtype = rng.choice(["float16", "float32"])
    # Parquet eight times, then the others
    how: dict[str, Any] = {}
    if seed >= 8:
        how["format"] = ("webdataset", "npy")[seed % 2]
        how["features"] = SHAPES if how["format"] == "webdataset" else BOTH
        monkeypatch.setattr(webdataset_format, "BATCH_BYTES", rng.choice([3000, 1 << 20]))
    settings = replace(
        settings_of(tmp_path / "out", dtype, **how), target_part_bytes=rng.choice([2000, 1 << 30])
    )
    first, all_of_them = computed(write_shard(tmp_path / "1.tar", IMAGES), settings)
    assert (first.tiles, first.reused) == (all_of_them, 0)
    chunk_tiles = rng.choice([1, 6, 100])
    changed = variants(rng)
    source = write_shard(tmp_path / "2.tar", changed, "another caption")
    second, calculated = computed(source, settings, first, chunk_tiles, rng.choice([None, 1, 4]))
    other = settings_of(tmp_path / "fresh", dtype, **how)
    fresh, expected = computed(source, other, None, chunk_tiles)
    assert read_rows(second, settings).equals(read_rows(fresh, other))
    assert (second.samples, second.rejects) == (fresh.samples, fresh.rejects)
    new = [image for image in changed if image not in IMAGES and image != BAD]
    rows = read_rows(fresh, other)
    known_samples = {index for index, image in enumerate(changed) if image in IMAGES}
    known = sum(index in known_samples for index in rows["sample_index"].to_pylist())
    assert calculated == expected - known
    assert second.reused == known
    assert bool(calculated) == bool(new)


def test_a_group_gets_the_rows_of_its_own_pictures_alone(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    first, _ = computed(write_shard(tmp_path / "1.tar", IMAGES[:4]), settings)
    shard = Shard("", "s", mark_of(first))
    with committed_rows(shard, settings.parts, settings.fingerprint) as rows:
        assert rows is not None
        assert rows.of([IMAGES[9], BAD]) is None
        found = rows.of([IMAGES[2], IMAGES[9], IMAGES[2], IMAGES[0]])
    assert found is not None
    table = rows_of(tmp_path, first)
    wanted = [i for i, at in enumerate(table["sample_index"].to_pylist()) if at in (2, 0)]
    assert found.num_rows == len(wanted)
    assert {bytes(d) for d in found["image_sha256"].to_pylist()} == {
        bytes(table["image_sha256"][i].as_py()) for i in wanted
    }


def test_a_picture_that_would_be_cut_otherwise_now_is_computed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    source = write_shard(tmp_path / "1.tar", IMAGES[:4])
    first, tiles = computed(source, settings)
    path = tmp_path / first.parts[0].path
    table = pq.read_table(path)
    width = pa.array([value + 1 for value in table["width"].to_pylist()], pa.int32())
    table = table.set_column(table.column_names.index("width"), "width", width)
    pq.write_table(table, path)
    second, calculated = computed(source, settings, with_bytes_of(first, path))
    assert (second.reused, calculated) == (0, tiles)


def with_bytes_of(commit: Commit, path: Path) -> Commit:
    data = path.read_bytes()
    part = commit.parts[0].model_copy(
        update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    )
    return commit.model_copy(update={"parts": (part,)})


def damage(commit: Commit, path: Path) -> Commit:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return commit


def lose(commit: Commit, path: Path) -> Commit:
    path.unlink()
    return commit


def shorten(commit: Commit, path: Path) -> Commit:
    path.write_bytes(path.read_bytes()[:-1])
    return commit


def miscount(commit: Commit, path: Path) -> Commit:
    part = commit.parts[0].model_copy(update={"rows": commit.parts[0].rows + 1})
    return commit.model_copy(update={"parts": (part,)})


def of_another(commit: Commit, path: Path) -> Commit:
    return commit.model_copy(update={"fingerprint": "e" * 64})


def elsewhere(commit: Commit, path: Path) -> Commit:
    part = commit.parts[0].model_copy(update={"path": "../" + commit.parts[0].path})
    return commit.model_copy(update={"parts": (part,)})


def no_parquet(commit: Commit, path: Path) -> Commit:
    path.write_bytes(b"x" * 100)
    return with_bytes_of(commit, path)


def out_of_order(commit: Commit, path: Path) -> Commit:
    pq.write_table(pq.read_table(path).sort_by("tile_index"), path)
    return with_bytes_of(commit, path)


def without_first_tile(commit: Commit, path: Path) -> Commit:
    table = pq.read_table(path)
    table = table.slice(table["tile_index"].to_pylist().index(1))
    pq.write_table(table, path)
    part = with_bytes_of(commit, path).parts[0].model_copy(update={"rows": table.num_rows})
    return commit.model_copy(update={"parts": (part,)})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "embeddings/s.parquet: its bytes are not those that were committed"),
        (lose, "embeddings/s.parquet: missing"),
        (shorten, "bytes, the commit says"),
        (miscount, "rows, the commit says"),
        (of_another, "its commit has another fingerprint, eeeeeeeeeeee"),
        (elsewhere, "not a name of this shard's parts"),
        (no_parquet, "Parquet"),
        (without_first_tile, "its rows do not stand picture by picture"),
        (out_of_order, "its rows do not stand picture by picture"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_trusted_is_computed_whole_and_said_once(
    spoil: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path / "out")
    source = write_shard(tmp_path / "s.tar", IMAGES[:6])
    first, tiles = computed(source, settings)
    path = tmp_path / "out" / first.parts[0].path
    before = spoil(first, path)
    second, calculated = computed(source, settings, before)
    assert (second.reused, calculated) == (0, tiles)
    (message,) = caplog.messages
    assert message.startswith("shard s: nothing is taken over, all of it is computed again: ")
    assert reason in message
    fresh, _ = computed(source, settings_of(tmp_path / "fresh"))
    assert rows_of(tmp_path / "out", second).equals(rows_of(tmp_path / "fresh", fresh))


@pytest.mark.parametrize("gone", [False, True])
def test_a_commit_that_was_not_compared_gives_nothing(
    gone: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path / "out")
    source = write_shard(tmp_path / "s.tar", IMAGES[:6])
    first, _ = computed(source, settings)
    url = commit_url(settings.parts.output, "s")
    if gone:
        STORAGE.remove(url)
    else:
        STORAGE.publish_bytes(url, first.model_copy(update={"samples": 7}).dump())
    shard = Shard(str(source), "s", mark_of(first))
    with committed_rows(shard, settings.parts, settings.fingerprint) as rows:
        assert rows is None
    (message,) = caplog.messages
    assert (
        "commits/s.json is not there" if gone else "its commit is not the one that was compared"
    ) in message


def test_chunks_are_the_same_whatever_is_known(tmp_path: Path) -> None:
    """Ray repeats a task by skipping as many outputs as it has seen."""
    settings = settings_of(tmp_path)
    first, _ = computed(write_shard(tmp_path / "1.tar", IMAGES[::2]), settings)
    source = write_shard(tmp_path / "2.tar", IMAGES)
    plain = tile_shard(source, 6, CARRY)
    shard = Shard(str(source), "s", mark_of(first))
    with committed_rows(shard, settings.parts, settings.fingerprint) as committed:
        known = tile_shard(source, 6, CARRY, change=lambda group: with_known(group, committed))
    assert len(plain) == len(known) > 4
    for one, other in zip(plain, known, strict=True):
        assert one.rows.equals(other.rows)
        assert one.head.chunk_id == other.head.chunk_id
        assert other.known is not None
        assert len(other.tiles) + other.known.num_rows == len(one.tiles)
        again = Chunk.load(other.dump())
        assert again.known is not None
        assert again.known.equals(other.known)
        assert Chunk.load(one.dump()).known is None
    assert sum(len(chunk.tiles) for chunk in known) > 0
    given_up = reject_chunk(known[0], settings.parts, "3 replicas died")
    assert given_up.rows.num_rows == given_up.reused == known[0].known.num_rows > 0
    lost = set(given_up.rejects["sample_index"].to_pylist())
    assert lost.isdisjoint(given_up.rows["sample_index"].to_pylist())
    assert lost | set(given_up.rows["sample_index"].to_pylist()) == set(
        known[0].rows["sample_index"].to_pylist()
    )


def test_a_part_tells_what_was_taken_over() -> None:
    part = Part(Head("s", "u", 0), "f", 1, 5, {}, 10, reused=3)
    assert Part.load(part.dump()) == part
