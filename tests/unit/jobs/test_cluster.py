"""What a failing cluster looks like to a user."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayError, RayTaskError

from jobs import cluster
from jobs.cluster import broken_runs_explained
from jobs.terminal import BrokenRunError
from pipeline.ledger import LedgerError


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            RayTaskError(
                "_tile",
                "ray::_tile()\n  File x, line 3\nZeroDivisionError: division by zero\n",
                ZeroDivisionError("division by zero"),
                proctitle="ray::_tile()",
                ip="127.0.0.1",
            ),
            "ZeroDivisionError: division by zero",
        ),
        (RayError("The actor died.\n\tIts node ran out of memory.\n"), "ran out of memory."),
        (LedgerError("part 00001 000000-000002 came twice"), "000002 came twice"),
    ],
)
def test_a_broken_run_is_one_line(
    error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "log_folder", lambda: Path("/tmp/ray/session/logs"))
    with pytest.raises(BrokenRunError) as caught, broken_runs_explained():
        raise error
    line = str(caught.value)
    assert line.startswith("the run broke off: ")
    assert f"{cause}; what is committed stays" in line
    assert line.endswith("Ray's logs: /tmp/ray/session/logs")
    assert "\n" not in line


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), broken_runs_explained():
        raise ZeroDivisionError
