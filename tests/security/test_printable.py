"""What comes from data cannot forge a line of a log or command the terminal it is shown on."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import pytest

from jobs.progress import now
from jobs.show import show_status, show_verification
from jobs.status import Status
from jobs.terminal import OneLine
from jobs.verify import Verification
from pipeline.commits import Dataset, Failure, Progress
from pipeline.printable import printable
from pipeline.storage import redact
from tests.builders import tar_bytes
from tests.stages import read_shard

EVIL = "a\nshard x is committed\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj.exe\u2028z\x00"


def is_plain(text: str) -> bool:
    return not any(c in text for c in "\r\x1b\x07\x9b\u202e\u2028\x00")


def test_every_unprintable_character_is_escaped() -> None:
    shown = printable(EVIL)
    assert shown == (
        r"a\nshard x is committed\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj.exe\u2028z\x00"
    )
    assert printable("Zürich 東京 🗼 a+b") == "Zürich 東京 🗼 a+b"
    assert printable("\udcff") == r"\udcff"
    shown.encode()


def test_a_url_in_a_log_is_one_line() -> None:
    assert redact("s3://b/in/a\nb\x1b[2J.tar") == r"s3://b/in/a\nb\x1b[2J.tar"
    assert redact("http://u:p@h/a\nb?sig=1") == r"http://h/a\nb"


def test_a_record_of_the_log_is_one_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "shard %s: bad", (EVIL,), None)
    shown = OneLine("%(message)s").format(record)
    assert is_plain(shown)
    assert "\n" not in shown


def test_the_reason_of_a_broken_shard_is_one_line(tmp_path: Path) -> None:
    """It names the member; Ray prints what workers log as it is."""
    data = tar_bytes([("ok.jpg", b"x"), (f"{EVIL[:-1]}.jpg", b"y" * 5000)], tarfile.PAX_FORMAT)
    path = tmp_path / "s.tar"
    path.write_bytes(data[: data.index(b"yyy") + 100])
    end = read_shard(path)[-1].head.end
    assert end is not None
    assert end.failure is not None
    assert "gpj.exe" in end.failure
    assert is_plain(end.failure)
    assert "\n" not in end.failure


def test_what_is_shown_of_an_output_made_by_strangers(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.describe(EVIL, EVIL, "w", {"tiling": EVIL}, {EVIL: 3}, "1")
    failure = Failure(shard=EVIL, reason=EVIL)
    progress = Progress(
        started_at=now(), updated_at=now(), ended=True, shards=1, committed=0,
        failures=(failure,), tiles=0, rejects=0, tiles_per_second=0.0,
    )  # fmt: skip
    show_status(Status(dataset, 0, 0, 0, 0, 0, {}, progress), EVIL)
    show_verification(Verification(0, 0, 0, 0, 0, (EVIL,), None), EVIL)
    shown = capsys.readouterr().out
    assert "gpj.exe" in shown
    assert is_plain(shown)
    assert not any(line.startswith("shard x is committed") for line in shown.splitlines())


def test_a_log_stream_gets_one_line_a_record() -> None:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(OneLine("%(message)s"))
    handler.handle(logging.LogRecord("x", logging.ERROR, "f", 1, EVIL, None, None))
    assert sink.getvalue().count("\n") == 1
    assert is_plain(sink.getvalue())
