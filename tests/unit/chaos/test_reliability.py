"""docs/reliability.md is what the results files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaos.reliability import DOCUMENT, newest, rendered
from chaos.results import FaultRow, write_rows


def test_the_committed_document_is_what_the_results_say() -> None:
    assert DOCUMENT.read_text() == rendered(), "run `make reliability`"


def test_the_newest_file_of_each_suite_counts(tmp_path: Path) -> None:
    row = FaultRow("a fault", 3, "it went on", "it goes on", "storage")
    write_rows([row], "storage", tmp_path)
    (tmp_path / "2020-01-01-faults-storage.json").write_text("[]")
    (tmp_path / "2020-01-01-faults-chaos.json").write_text(
        json.dumps([{**vars(row), "suite": "chaos", "fault": "another"}])
    )
    assert [file.name.partition("faults-")[2] for file in newest(tmp_path)] == [
        "chaos.json",
        "storage.json",
    ]
    text = rendered(tmp_path)
    assert "| a fault | 3 | it went on | it goes on |" in text
    assert text.index("another") < text.index("a fault")


def test_a_row_of_other_fields_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "2020-01-01-faults-x.json").write_text('[{"fault": "f", "count": 1}]')
    with pytest.raises(TypeError):
        rendered(tmp_path)
