"""`verify` passes what is whole and finds each thing that can be wrong, and names where."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import Verification, verify
from model.errors import UserError
from pipeline.commits import Progress
from tests.outputs import (
    BAD_PICTURE,
    altered,
    check,
    edit_commit,
    extract_plainly,
    rewrite,
)

Mutation = Callable[[Path], None]


def order(table: pa.Table, *moves: tuple[int, int]) -> pa.Table:
    rows = list(range(table.num_rows))
    for first, second in moves:
        rows[first], rows[second] = rows[second], rows[first]
    return table.take(rows)


def first_rows(table: pa.Table) -> list[int]:
    """The row of tile 0 of each picture."""
    return [row for row, tile in enumerate(table["tile_index"].to_pylist()) if tile == 0]


def test_a_whole_output_passes(made: Path) -> None:
    rows = [pq.read_table(made / f"out/embeddings/{s}.parquet").num_rows for s in ("a", "a/b")]
    found = check(made, inputs=(str(made / "in"),))
    assert found == Verification(
        shards=2, samples=13, embedded=12, rejects=1, tiles=sum(rows), problems=(), recomputed=None
    )
    assert found.to_json()["whole"] is True
    assert sum(rows) > 24  # pictures of several tiles are among them


def test_an_output_in_several_parts_passes(made: Path, tmp_path: Path) -> None:
    commits = extract_plainly(
        [made / "in"], tmp_path / "out", made / "ckpt", chunk_tiles=1, target_part_bytes=1
    )
    assert [len(commit.parts) for commit in commits] == [7, 5]
    assert check(tmp_path, inputs=(str(made / "in"),), recompute=2).problems == ()
    (tmp_path / "out/embeddings/a-00003.parquet").unlink()
    assert check(tmp_path).problems == ("embeddings/a-00003.parquet: missing",)


def missing_part(root: Path) -> None:
    (root / "out/embeddings/a/b.parquet").unlink()


def missing_rejects(root: Path) -> None:
    (root / "out/rejects/a.parquet").unlink()


def flipped_byte(root: Path) -> None:
    path = root / "out/embeddings/a.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shortened_part(root: Path) -> None:
    path = root / "out/embeddings/a.parquet"
    path.write_bytes(path.read_bytes()[:-1])


def no_parquet(root: Path) -> None:
    path = root / "out/embeddings/a.parquet"
    data = bytes(len(path.read_bytes()))
    path.write_bytes(data)

    def follow(commit: dict[str, Any]) -> None:
        commit["parts"][0]["sha256"] = hashlib.sha256(data).hexdigest()

    edit_commit(root, "a", follow)


def removed_commit(root: Path) -> None:
    (root / "out/commits/a/b.json").unlink()


def dropped_row(root: Path) -> None:
    def drop(table: pa.Table) -> pa.Table:
        counts = table["tile_count"].to_pylist()
        row = next(row for row, count in enumerate(counts) if count > 1)
        return table.filter(pa.array([at != row + counts[row] - 1 for at in range(len(counts))]))

    rewrite(root, "a/b", drop)


def dropped_picture(root: Path) -> None:
    rewrite(
        root,
        "a/b",
        lambda table: table.filter(pa.array([i != 2 for i in table["sample_index"].to_pylist()])),
    )


def swapped_tiles(root: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        row = table["tile_index"].to_pylist().index(1)
        return order(table, (row - 1, row))

    rewrite(root, "a", swap)


def swapped_pictures(root: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        starts = first_rows(table)
        rows = list(range(table.num_rows))
        moved = rows[starts[1] : starts[2]] + rows[: starts[1]] + rows[starts[2] :]
        return table.take(moved)

    rewrite(root, "a", swap)


def nan_written(root: Path) -> None:
    def spoil(values: np.ndarray) -> None:
        values[-1, 3] = np.nan

    rewrite(root, "a", lambda table: altered(table, "mean", spoil))


def null_written(root: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        keys = [None, *table["key"].to_pylist()[1:]]
        return table.set_column(0, table.schema.field("key"), pa.array(keys))

    rewrite(root, "a", spoil)


def other_key_in_one_row(root: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        keys = table["key"].to_pylist()
        keys[table["tile_index"].to_pylist().index(1)] = "other"
        return table.set_column(0, table.schema.field("key"), pa.array(keys))

    rewrite(root, "a", spoil)


def other_schema(root: Path) -> None:
    wide = pa.list_(pa.float32(), 80)
    rewrite(root, "a", lambda t: t.set_column(9, "cls", t["cls"].cast(wide)))


def missing_column(root: Path) -> None:
    rewrite(root, "a", lambda table: table.drop_columns(["txt"]))


def removed_reject(root: Path) -> None:
    (root / "out/rejects/a.parquet").unlink()
    edit_commit(root, "a", lambda commit: commit.update(rejects=0, rejects_part=None))


def rejected_twice(root: Path) -> None:
    """The reject names a sample that is embedded."""
    path = root / "out/rejects/a.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "sample_index", pa.array([5], pa.int32())), path)

    def follow(commit: dict[str, Any]) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        commit["rejects_part"] |= {"bytes": path.stat().st_size, "sha256": digest}

    edit_commit(root, "a", follow)


def other_fingerprint(root: Path) -> None:
    edit_commit(root, "a", lambda commit: commit.update(fingerprint="0" * 64))


def other_counts(root: Path) -> None:
    edit_commit(root, "a", lambda commit: commit.update(tiles=commit["tiles"] + 1))


def other_histogram(root: Path) -> None:
    def move(commit: dict[str, Any]) -> None:
        commit["tile_counts"]["1"] = commit["tile_counts"].pop("3")

    edit_commit(root, "a/b", move)


def other_codes(root: Path) -> None:
    edit_commit(root, "a", lambda commit: commit.update(reject_codes={"decode/memory": 1}))


def truncated_commit(root: Path) -> None:
    path = root / "out/commits/a.json"
    path.write_bytes(path.read_bytes()[:-20])


def commit_of_another_shard(root: Path) -> None:
    edit_commit(root, "a/b", lambda commit: commit.update(shard="a"))


def edited_dataset(root: Path) -> None:
    path = root / "out/dataset.json"
    dataset = json.loads(path.read_text())
    dataset["settings"]["layer"] = 1
    path.write_text(json.dumps(dataset))


def stray_part(root: Path) -> None:
    shutil.copy(root / "out/rejects/a.parquet", root / "out/rejects/c.parquet")


def temporary_file(root: Path) -> None:
    (root / "out/commits/a.json.tmp-0123abcd").write_bytes(b"{")


def dead_run(root: Path) -> None:
    (root / "out/_runs/r1/parts").mkdir(parents=True)
    (root / "out/_runs/r1/parts/x.arrow").write_bytes(b"")


CASES: list[tuple[Mutation, list[str]]] = [
    (missing_part, ["embeddings/a/b.parquet: missing"]),
    (missing_rejects, ["rejects/a.parquet: missing"]),
    (flipped_byte, ["embeddings/a.parquet: its bytes are not those that were committed"]),
    (shortened_part, ["embeddings/a.parquet: "]),
    (no_parquet, ["embeddings/a.parquet: cannot be read as Parquet"]),
    (removed_commit, ["embeddings/a/b.parquet: part without commit"]),
    (dropped_row, ["shard a/b: sample "]),
    (dropped_picture, ["shard a/b: sample 2: neither embedded nor rejected"]),
    (swapped_tiles, ["shard a: sample "]),
    (swapped_pictures, ["shard a: rows out of order: sample 0 after sample 1"]),
    (nan_written, ["embeddings/a.parquet: a value of mean is not finite: sample 7"]),
    (null_written, ["embeddings/a.parquet: column key holds nulls"]),
    (other_key_in_one_row, ["embeddings/a.parquet: rows of one picture differ in key: sample "]),
    (other_schema, ["embeddings/a.parquet: column cls is fixed_size_list<element: float>[80]"]),
    (missing_column, ["embeddings/a.parquet: columns key, sample_index"]),
    (removed_reject, [f"shard a: sample {BAD_PICTURE}: neither embedded nor rejected"]),
    (
        rejected_twice,
        [
            f"shard a: sample {BAD_PICTURE}: neither embedded nor rejected",
            "shard a: sample 5: both embedded and rejected",
        ],
    ),
    (other_fingerprint, ["commits/a.json: made with another fingerprint (000000000000;"]),
    (other_counts, ["commits/a.json: "]),
    (other_histogram, ["shard a/b: pictures by their tiles: {1: 5} in the commit, {3: 5} there"]),
    (
        other_codes,
        ["shard a: rejects by their codes: {'decode/memory': 1} in the commit, {'decode"],
    ),
    (truncated_commit, ["commits/a.json: the document: Invalid JSON"]),
    (commit_of_another_shard, ["commits/a/b.json: it is of another shard, a"]),
    (edited_dataset, ["dataset.json: its fingerprint is not that of its settings"]),
    (stray_part, ["rejects/c.parquet: part without commit"]),
    (temporary_file, ["commits/a.json.tmp-0123abcd: left by a run that died"]),
    (dead_run, ["_runs/r1/parts/x.arrow: left by a run that died"]),
]


@pytest.mark.parametrize(("mutate", "expected"), CASES, ids=[c[0].__name__ for c in CASES])
def test_what_is_wrong_is_found_and_named(
    mutate: Mutation, expected: list[str], copy: Path
) -> None:
    mutate(copy)
    problems = check(copy).problems
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)
        assert "\n" not in problem


def test_a_run_that_is_not_finished_is_said_instead_of_its_leftovers(copy: Path) -> None:
    dead_run(copy)
    temporary_file(copy)
    record = Progress(
        started_at="2026-01-01T00:00:00+00:00",
        updated_at="2026-01-01T00:00:10+00:00",
        ended=True,
        shards=3,
        committed=2,
        failures=({"shard": "c", "reason": "cut at byte 512"},),  # type: ignore[arg-type]
        tiles=1,
        rejects=0,
        tiles_per_second=0.1,
    )
    (copy / "out/_runs/r1/progress.json").write_bytes(record.dump())
    assert check(copy).problems == (
        "_runs/r1/progress.json: the run is not finished, 2 of 3 shards committed; "
        "run `extract` again",
        "shard c: failed, cut at byte 512",
    )


def test_an_output_without_commits_is_not_whole(copy: Path) -> None:
    for folder in ("commits", "embeddings", "rejects"):
        shutil.rmtree(copy / "out" / folder)
    assert check(copy).problems == ("commits: no shard is committed",)


def test_what_is_no_output_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json there"):
        verify(str(tmp_path))
