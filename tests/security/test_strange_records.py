"""Records of an OUTPUT that a stranger made: read as what they should be, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.status import read_status
from model.errors import UserError
from pipeline.commits import Commit, Dataset, Progress

SETTINGS = {"tiling": "dynamic", "embedding_dtype": "float16", "image_key": ["jpg"], "carry": []}
PROGRESS = {
    "started_at": "2026-01-01T00:00:00+00:00", "updated_at": "2026-01-01T00:00:00+00:00",
    "ended": False, "shards": 1, "committed": 0, "failures": [], "tiles": 0, "rejects": 0,
    "tiles_per_second": 0.0,
}  # fmt: skip


def dataset(**changes: Any) -> bytes:
    made = Dataset.describe("m", None, "w", SETTINGS, {"cls": 3}, "1").model_dump()
    return json.dumps({**made, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"a":' * 50_000,
        dataset(settings=[]),
        dataset(features={"cls": "x"}), dataset(surplus=1), dataset(**{"a\n\x1b[2J" * 1000: 1}),
        dataset(schema_version="one"), dataset(features=None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Dataset, Commit, Progress])
def test_a_record_of_anything_is_one_short_line(
    kind: type[Dataset] | type[Commit] | type[Progress], data: bytes
) -> None:
    with pytest.raises(UserError) as refused:
        kind.parse(data, "out/dataset.json")
    message = str(refused.value)
    assert message.startswith("out/dataset.json: ")
    assert len(message) < 400
    assert "\n" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize("when", ["", "now", "2026-01-01", "2026-01-01T00:00:00", 3, None])
def test_a_time_that_is_none_is_refused(when: object) -> None:
    data = json.dumps({**PROGRESS, "updated_at": when}).encode()
    with pytest.raises(UserError, match="p: updated_at: "):
        Progress.parse(data, "p")
    assert Progress.parse(json.dumps(PROGRESS).encode(), "p").shards == 1


def test_status_of_an_output_without_settings(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(dataset(settings={}))
    with pytest.raises(UserError, match=r"dataset.json: settings.tiling: Field required"):
        read_status(str(tmp_path), {})
    for bad in ({"carry": {"a": 1}}, {"embedding_dtype": "object"}, {"image_key": "jpg"}):
        (tmp_path / "dataset.json").write_bytes(dataset(settings={**SETTINGS, **bad}))
        with pytest.raises(UserError, match=f"dataset.json: settings.{next(iter(bad))}: "):
            read_status(str(tmp_path), {})
    (tmp_path / "dataset.json").write_bytes(dataset())
    assert read_status(str(tmp_path), {}).committed == 0
