"""`tessera reindex` through real Ray: what is new or changed is computed, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.status import read_status
from jobs.verify import verify
from pipeline.vectors import feature_values
from tests.builders import files_below, picture, run_cli, sample, write_checkpoint, write_tar
from tests.outputs import extract_plainly

OPTIONS: dict[str, Any] = {
    "tiling": "dynamic", "max_tiles": 4, "dtype": "float32", "embedding_dtype": "float32",
    "features": ("cls",), "carry": ("txt",),
}  # fmt: skip
PICTURES = 6
WIDTH = 80


def command_line(**changes: Any) -> list[str]:
    words = []
    for name, value in {**OPTIONS, **changes}.items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def images(shard: int) -> list[bytes]:
    return [picture(60 + 30 * n, 60, seed=100 * shard + n) for n in range(PICTURES)]


def put(folder: Path, shard: str, pictures: list[bytes]) -> None:
    members = [m for n, data in enumerate(pictures) for m in sample(f"{n:03}", data, f"of {shard}")]
    write_tar(folder / "in" / f"{shard}.tar", members)


class Story:
    """Reindexing runs one after the other over the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        write_checkpoint(folder / "model")

    def reindex(self, *flags: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        return run_cli(
            "reindex", self.folder / "in", self.out, "--model", self.folder / "model",
            *command_line(**changes), "--json", *flags,
        )  # fmt: skip

    def fresh(self, name: str, **changes: Any) -> Path:
        """What `extract` makes of INPUT as it is now."""
        output = self.folder / name
        options = {**OPTIONS, **changes}
        extract_plainly([self.folder / "in"], output, self.folder / "model", 32, **options)
        return output


def rows_of(output: Path, shard: str) -> pa.Table:
    commit = json.loads((output / f"commits/{shard}.json").read_text())
    return pa.concat_tables([pq.read_table(output / part["path"]) for part in commit["parts"]])


def assert_same_rows(output: Path, expected: Path, shard: str) -> None:
    """Batches differ, and with them last bits; all else is the same."""
    one, other = rows_of(output, shard), rows_of(expected, shard)
    assert one.drop_columns(["cls"]).equals(other.drop_columns(["cls"]))
    values = [feature_values(table["cls"], WIDTH) for table in (one, other)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Three shards, of which one has a reject, are committed; then INPUT changes."""
    story = Story(tmp_path_factory.mktemp("reindex"))
    for number, name in enumerate(("keep", "gone", "changed")):
        put(story.folder, name, images(number))
    extract_plainly(
        [story.folder / "in"], story.out, story.folder / "model", chunk_tiles=32, **OPTIONS
    )
    changed = images(2)
    changed[3] = picture(130, 90, seed=999)
    put(story.folder, "changed", [*changed, b"no picture"])
    put(story.folder, "new", images(4))
    (story.folder / "in/gone.tar").unlink()
    return story


def test_only_what_changed_is_computed(story: Story) -> None:
    before = files_below(story.out)
    times = {p: p.stat().st_mtime_ns for p in (story.out / "commits").iterdir()}
    planned = story.reindex("--dry-run")
    assert planned.returncode == 0, planned.stderr
    classes = json.loads(planned.stdout)["plan"]["classes"]
    shards = {name: sums["shards"] for name, sums in classes.items()}
    assert shards == {"new": 1, "changed": 1, "retry": 0, "unchanged": 1, "vanished": 1}
    assert files_below(story.out) == before

    done = story.reindex()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["plan"]["classes"], told["committed"]) == (classes, 2)
    fresh = story.fresh("fresh")
    tiles = Counter(rows_of(fresh, "changed")["sample_index"].to_pylist())
    new_tiles = tiles[3] + rows_of(fresh, "new").num_rows
    reused = sum(tiles.values()) - tiles[3]
    assert (told["reused_tiles"], told["computed_tiles"]) == (reused, new_tiles)
    assert re.search(r"^changed +1 ", done.stderr, re.MULTILINE)

    commit = json.loads((story.out / "commits/changed.json").read_text())
    assert [part["path"] for part in commit["parts"]] == ["embeddings/changed.g00002.parquet"]
    assert (commit["reused"], commit["rejects"]) == (reused, 1)
    after = files_below(story.out)
    assert set(after) == {
        "dataset.json",
        *(f"commits/{name}.json" for name in ("keep", "gone", "changed", "new")),
        *(f"embeddings/{name}.parquet" for name in ("keep", "gone", "changed.g00002", "new")),
        "rejects/changed.g00002.parquet",
    }
    for name in ("keep", "gone"):
        path = story.out / f"commits/{name}.json"
        assert path.stat().st_mtime_ns == times[path]
    for name in ("keep", "changed", "new"):
        assert_same_rows(story.out, fresh, name)


def test_then_there_is_nothing_to_do_and_what_is_gone_can_be_pruned(story: Story) -> None:
    """Runs after the one before it."""
    done = story.reindex("--prune")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["pruned"] == ["gone"]
    assert (told["committed"], told["computed_tiles"]) == (0, 0)
    assert not [name for name in files_below(story.out) if "gone" in name]
    again = run_cli(
        "extract", story.folder / "in", story.out, "--model", story.folder / "model",
        *command_line(),
    )  # fmt: skip
    assert again.stdout == "nothing to do: all 3 shards are committed\n", again.stderr
    report = verify(str(story.out), inputs=(str(story.folder / "in"),))
    assert (report.problems, report.shards) == ((), 3)


def test_another_tiling_becomes_a_version_that_readers_are_led_to(story: Story) -> None:
    before = files_below(story.out)
    done = story.reindex(tiling="center-crop")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    version = told["plan"]["version"]
    assert (told["switched"], told["committed"], told["reused_tiles"]) == (True, 3, 0)
    after = files_below(story.out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {
        *("current.json", "versions"),
    }
    fresh = story.fresh("cropped", tiling="center-crop")
    for name in ("keep", "changed", "new"):
        assert_same_rows(story.out / "versions" / version, fresh, name)
    status = read_status(str(story.out), {})
    assert (status.version, status.committed) == (version, 3)
    assert status.dataset.settings["tiling"] == "center-crop"
