"""Records come out of a row or a file as they went in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import (
    Head,
    Part,
    Reject,
    Seconds,
    ShardEnd,
    Work,
    carried_field,
    embedding_schema,
    from_ipc,
    one_row,
    rejects_table,
    to_ipc,
)

SECONDS = st.builds(Seconds, *[st.floats(0, 1e6)] * 4)
ENDS = st.builds(
    ShardEnd,
    samples=st.integers(0, 10**9),
    size=st.integers(0, 10**15),
    etag=st.none() | st.text(),
    truncated_at=st.none() | st.integers(0),
    failure=st.none() | st.text(),
)
WORKS = st.builds(
    Work,
    node=st.text(),
    replica=st.text(),
    tiles=st.integers(0, 10**6),
    seconds=st.floats(0, 1e6),
    starved_seconds=st.floats(0, 1e6),
)
HEADS = st.builds(
    Head,
    shard=st.text(),
    url=st.text(),
    group=st.integers(0, 10**6),
    chunk=st.integers(0, 10**6),
    last_chunk=st.booleans(),
    end=st.none() | ENDS,
    seconds=SECONDS,
    work=st.none() | WORKS,
    tile_deaths=st.integers(0, 9),
    embed_deaths=st.integers(0, 9),
)
PARTS = st.builds(
    Part,
    head=HEADS,
    file=st.text(),
    samples=st.integers(0),
    tiles=st.integers(0),
    rejects=st.dictionaries(st.text(), st.integers(1), max_size=3),
    num_bytes=st.integers(0),
    failure=st.none() | st.text(),
    tile_counts=st.dictionaries(st.text(), st.integers(1), max_size=3),
)


@settings(deadline=None)
@given(head=HEADS)
def test_a_head_comes_out_as_it_went_in(head: Head) -> None:
    assert Head.load(head.dump()) == head


@settings(deadline=None)
@given(part=PARTS)
def test_a_part_comes_out_as_it_went_in(part: Part) -> None:
    assert Part.load(part.dump()) == part


def test_chunk_ids_sort_in_the_shards_order() -> None:
    heads = [Head("s", "u", group, chunk) for group in (0, 9, 10) for chunk in (0, 9, 10, 100)]
    ids = [head.chunk_id for head in heads]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


def test_a_row_keeps_bytes_that_end_in_zeros() -> None:
    row = one_row(data=b"\0ab\0\0", tiles=np.ones((3, 2), np.uint8))
    assert row["data"][0] == b"\0ab\0\0"
    assert row["tiles"].shape == (1, 3, 2)


def test_seconds_add_up_by_stage() -> None:
    assert Seconds(1, 2, 3, 4) + Seconds(write=1) == Seconds(1, 2, 3, 5)


def test_the_columns_of_an_output() -> None:
    schema = embedding_schema({"mean": 4, "cls": 4}, "float16", ("txt", "json:a", "npy"))
    assert schema.names == [
        *("key", "sample_index", "tile_index", "tile_count", "is_thumbnail", "tile_box"),
        *("width", "height", "image_sha256", "mean", "cls", "txt", "json:a", "npy"),
    ]
    assert schema.field("cls").type == pa.list_(pa.float16(), 4)
    assert schema.field("tile_box").type == pa.list_(pa.float32(), 4)
    assert schema.field("image_sha256").type == pa.binary(32)
    assert [schema.field(name).type for name in ("txt", "json:a", "npy")] == [
        pa.string(),
        pa.string(),
        pa.binary(),
    ]
    wide = embedding_schema({"cls": 4}, "float32", ())
    assert wide.field("cls").type == pa.list_(pa.float32(), 4)


def test_text_and_binary_members() -> None:
    assert carried_field("json:url").type == pa.string()
    assert carried_field("seg.png").type == pa.binary()


def test_a_table_comes_out_as_it_went_in() -> None:
    table = rejects_table([Reject("k", 3, "k.jpg", "decode", "truncated", "cut \0 short")])
    assert from_ipc(to_ipc(table)).equals(table)
    assert from_ipc(to_ipc(rejects_table([]))).schema == table.schema
