"""What a round would notice: other bytes, files too many or missing, commits written again."""

from __future__ import annotations

import os
from pathlib import Path

from chaos.rounds import Commits, differences


def test_a_commit_written_again_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "commits"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.json").write_text("{}")
    commits = Commits(tmp_path)
    assert commits.look() == len(commits.times) == 3
    assert commits.changed() == []
    (folder / "b.json").write_text("{ }")
    os.utime(folder / "c.json", ns=(1, 1))  # the same bytes, written at another time
    (folder / "d.json").write_text("{}")
    assert commits.look() == 4
    assert commits.changed() == ["b.json", "c.json"]


def test_differences_are_named() -> None:
    wanted = {"same": b"1", "other": b"1", "lost": b"1"}
    found = {"same": b"1", "other": b"2", "more": b"1"}
    assert differences(wanted, wanted) == ""
    assert differences(found, wanted) == "lost (missing), more (too many), other (other)"
