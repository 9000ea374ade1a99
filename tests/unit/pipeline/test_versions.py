"""Which folder is read, and when that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline.commits import Dataset, open_output
from pipeline.stock import Stock, take_stock
from pipeline.versions import (
    current,
    current_version,
    refuse_other_version,
    switch,
    version_folder,
    version_for,
)
from tests.builders import files_below
from tests.stages import STORAGE

SETTINGS = {"tiling": "dynamic", "embedding_dtype": "float16", "image_key": ["jpg"], "carry": []}


def dataset(**settings: Any) -> Dataset:
    return Dataset.describe("m", None, "w" * 64, {**SETTINGS, **settings}, {"cls": 80}, "0.1.0")


def put(path: Path, data: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data)


def test_an_output_of_one_fingerprint_is_what_is_read(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert version_for(output, dataset(), STORAGE) is None
    open_output(output, dataset(), STORAGE)
    assert version_for(output, dataset(), STORAGE) is None
    assert (current(output, STORAGE), current_version(output, STORAGE)) == (output, None)
    refuse_other_version(output, STORAGE)
    assert not switch(output, None, dataset(), STORAGE)
    # Nothing is committed: its settings may still change.
    assert version_for(output, dataset(tiling="center-crop"), STORAGE) is None


def test_another_fingerprint_gets_a_folder_and_then_the_readers(tmp_path: Path) -> None:
    output, other = str(tmp_path), dataset(tiling="center-crop")
    open_output(output, dataset(), STORAGE)
    put(tmp_path / "commits/a.json")
    put(tmp_path / "embeddings/a.parquet")
    version = version_for(output, other, STORAGE)
    assert version == other.fingerprint[:12]
    folder = version_folder(output, version)
    assert folder == f"{output}/versions/{version}"
    open_output(folder, other, STORAGE)
    put(tmp_path / f"versions/{version}/commits/a.json")
    assert current(output, STORAGE) == output
    before = files_below(tmp_path)
    assert switch(output, version, other, STORAGE)
    assert not switch(output, version, other, STORAGE)
    assert current(output, STORAGE) == folder
    record = json.loads((tmp_path / "current.json").read_text())
    assert (record["version"], record["fingerprint"]) == (version, other.fingerprint)
    assert {k: v for k, v in files_below(tmp_path).items() if k != "current.json"} == before
    assert version_for(output, other, STORAGE) == version
    with pytest.raises(UserError, match=f"current.json names version {version}") as caught:
        refuse_other_version(output, STORAGE)
    assert folder in str(caught.value)
    refuse_other_version(folder, STORAGE)
    # The old fingerprint again: its data are still there, and readers can be led back.
    assert version_for(output, dataset(), STORAGE) is None
    assert take_stock(output, ["a"], STORAGE) == Stock({"a"}, [])
    open_output(output, dataset(), STORAGE)
    assert switch(output, None, dataset(), STORAGE)
    assert current(output, STORAGE) == output
    assert not (tmp_path / "current.json").exists()


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"version": "../../else", "fingerprint": "f", "switched_at": "2026-01-01T00:00:00Z"}',
        '{"version": "0123456789ab", "fingerprint": "f", "switched_at": "never"}',
    ],
)
def test_a_record_that_is_none_is_an_error(record: str, tmp_path: Path) -> None:
    put(tmp_path / "current.json", record)
    with pytest.raises(UserError, match=r"current\.json: "):
        current(str(tmp_path), STORAGE)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="holds files"):
        version_for(str(tmp_path), dataset(), STORAGE)
