"""Ray's token and its session's folder: private, and left alone where the user has another."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from jobs import cluster, local_ray
from jobs.local_ray import (
    keep_session_private,
    keep_token_private,
    on_loopback,
    warn_without_authentication,
)
from model.errors import UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_an_empty_home_gets_a_private_token(home: Path) -> None:
    keep_token_private(create=True)
    token = home / ".ray" / "auth_token"
    text = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", text)
    assert token.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in token.parent.iterdir()] == ["auth_token"]
    keep_token_private(create=True)
    assert token.read_text() == text, "a token that is there stays"


def test_joining_a_cluster_makes_no_token(home: Path) -> None:
    keep_token_private(create=False)
    assert list(home.iterdir()) == []


def test_an_open_token_is_closed_and_said_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("t" * 64)
    token.chmod(0o644)
    keep_token_private(create=False)
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "t" * 64
    assert "other users could read" in caplog.text
    assert "t" * 64 not in caplog.text


@pytest.mark.parametrize(
    "setting", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=t", "RAY_AUTH_TOKEN_PATH=/nowhere"]
)
def test_what_the_user_set_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(*setting.split("="))
    keep_token_private(create=True)
    assert list(home.iterdir()) == []


def test_a_home_that_takes_no_file_is_one_line(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(UserError, match=r"auth_token: Ray's token cannot be kept there"):
        keep_token_private(create=True)


@pytest.mark.parametrize(("mode", "warned"), [("disabled", 1), ("nonsense", 1), ("Token", 0)])
def test_authentication_that_is_off_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str, warned: int
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    warn_without_authentication()
    assert len(caplog.records) == warned


def test_loopback_is_asked_for_only_while_a_cluster_starts() -> None:
    before = ray_constants.ENABLE_RAY_CLUSTER
    with on_loopback():
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert before == ray_constants.ENABLE_RAY_CLUSTER


def test_another_token_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is Ray's own class; that a real cluster raises it is not tried here."""

    def refuse(**_: object) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(UserError, match=r"10.0.0.1:6379: the cluster refuses .* RAY_AUTH_TOKEN"):
        cluster.connect()


def test_the_session_lies_in_a_folder_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "SESSIONS", str(tmp_path / "of-{uid}"))
    folder = tmp_path / f"of-{os.getuid()}"
    for _ in range(2):
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        keep_session_private()
        assert os.environ["RAY_TMPDIR"] == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    keep_session_private()
    assert os.environ["RAY_TMPDIR"] == "/mine"


@pytest.mark.parametrize("trap", ["open", "link", "file"])
def test_a_folder_that_somebody_laid_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.setattr(local_ray, "SESSIONS", str(tmp_path / "trap"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    private = tmp_path / "private"
    private.mkdir(0o700)
    if trap == "open":
        (tmp_path / "trap").mkdir()
        (tmp_path / "trap").chmod(0o777)
    elif trap == "link":
        (tmp_path / "trap").symlink_to(private)
    else:
        (tmp_path / "trap").write_text("")
    with pytest.raises(UserError, match="not a folder of this user's alone"):
        keep_session_private()
    assert "RAY_TMPDIR" not in os.environ
