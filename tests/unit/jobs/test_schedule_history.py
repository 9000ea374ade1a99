"""The history of a schedule survives its writer."""

from __future__ import annotations

import resource
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.schedule_history import End, Start, held_history, read_history
from jobs.terminal import BrokenRunError
from model.errors import UserError

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
START = Start(run="r", due=NOON, at=NOON)
END = End(run="r", at=NOON, status="SUCCEEDED", exit=0, changed={"new": 3})


def test_events_come_back_as_runs(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    assert read_history(file) == []
    with held_history(file) as history:
        history.append(START)
        assert [run.end for run in read_history(file)] == [None], "on disk at once"
    with held_history(file) as history:
        assert [run.start for run in history.runs] == [START]
        history.append(END)
    (run,) = read_history(file)
    assert (run.start, run.end) == (START, END)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_half_a_line_of_a_dead_writer_is_dropped(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "history.jsonl"
    with held_history(file) as history:
        history.append(START)
        history.append(END)
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert [run.end for run in read_history(file)] == [None]
    with held_history(file) as history:
        assert [run.end for run in history.runs] == [None]
        history.append(END)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, room: int) -> None:
    """Half a line, or none: either is taken back, and one line says so."""
    file = tmp_path / "history.jsonl"
    with held_history(file) as history:
        history.append(START)
        whole = file.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
        try:
            with pytest.raises(BrokenRunError, match=r"history\.jsonl: cannot be written: "):
                history.append(END)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == whole
        assert [run.end for run in history.runs] == [None]
        history.append(END)
    assert [run.end for run in read_history(file)] == [END]


def test_two_schedules_do_not_share_a_history(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    with held_history(file), pytest.raises(UserError, match="another schedule"), held_history(file):
        raise AssertionError("held twice")
    with held_history(file):
        pass


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", END.model_dump_json(), '{"event":"start","run":"r","x":1}']
)
def test_a_file_that_is_no_history_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1"):
        read_history(file)
    with pytest.raises(UserError), held_history(file):
        raise AssertionError("taken for a history")
    assert file.read_text() == f"{line}\n", "left as it was"
