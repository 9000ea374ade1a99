"""The end of a run whose storage has shut the door: told, and no reason to lose the summary."""

from __future__ import annotations

import logging

import pytest

from jobs.extract import left_to_the_next_run
from pipeline.storage import CredentialsError


def test_what_cannot_be_removed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with left_to_the_next_run("s3://key:secret@b/out"):
        raise CredentialsError("cannot remove s3://b/out/_runs: access refused (ExpiredToken)")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("s3://b/out: what this run needed for itself is not")
    assert "ExpiredToken" in record.getMessage()


def test_what_is_wrong_otherwise_is_raised() -> None:
    with pytest.raises(ValueError, match="x"), left_to_the_next_run("out"):
        raise ValueError("x")
