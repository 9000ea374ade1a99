"""How jobs end, what Ray's client raises, and which cluster is meant."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import requests
from ray.exceptions import AuthenticationError

from jobs import ray_jobs
from jobs.ray_jobs import ADDRESS, Cluster, Job, UnknownJobError, answering, connect, explained
from jobs.terminal import BrokenRunError
from model.errors import UserError


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),  # killed: as a shell says it
        ("FAILED", None, 1),  # Ray could not start it
        ("STOPPED", None, 143),
    ],
)
def test_exit_status(status: str, exit_code: int | None, expected: int) -> None:
    job = Job("j", status, "", "", {}, None, None, exit_code)
    assert job.over
    assert job.exit_status == expected


@pytest.mark.parametrize(
    ("raised", "becomes", "said"),
    [
        (AuthenticationError("Authentication required"), UserError, "RAY_AUTH_TOKEN"),
        (
            RuntimeError("Request failed with status code 404: Job j does not exist."),
            UnknownJobError,
            "job j",
        ),
        (
            RuntimeError("Request failed with status code 500: Traceback\n ValueError: Job with "
                         "submission_id j already exists. Please use"),
            UserError,
            "has one of that id already",
        ),
        (RuntimeError("Request failed\n…\nOSError: full\n"), BrokenRunError, "OSError: full"),
    ],
)  # fmt: skip
def test_errors_are_one_line(raised: Exception, becomes: type[Exception], said: str) -> None:
    with pytest.raises(becomes, match=said) as caught, explained("j"):
        raise raised
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raised", [ConnectionError("x"), TimeoutError(), requests.ReadTimeout()])
def test_a_cluster_that_does_not_answer_is_one_line(raised: Exception) -> None:
    with pytest.raises(BrokenRunError, match=type(raised).__name__), answering():
        raise raised


def test_drivers_that_nobody_submitted_are_not_listed() -> None:
    def details(submission_id: str | None, start: int) -> SimpleNamespace:
        return SimpleNamespace(
            submission_id=submission_id, job_id="01", status="RUNNING", message=None,
            entrypoint="e", metadata=None, start_time=start, end_time=None, driver_exit_code=None,
        )  # fmt: skip

    found = [details("late", 2000), details(None, 1500), details("early", 1000)]
    jobs = Cluster(SimpleNamespace(list_jobs=lambda: found)).jobs()
    assert [(job.id, job.started) for job in jobs] == [("early", 1.0), ("late", 2.0)]


@pytest.mark.parametrize("address", [None, "local"])
def test_no_cluster_is_looked_for(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="--address"):
        connect(None)


def test_the_command_line_wins_over_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv(ADDRESS, "http://127.0.0.1:2")
    monkeypatch.setattr(ray_jobs, "keep_token_private", lambda create: None)
    monkeypatch.setattr(
        ray_jobs, "maybe_enable_token_auth_if_token_available", lambda warn_if_disabled: None
    )
    with pytest.raises(UserError, match=r"127\.0\.0\.1:3: no Ray cluster answers"):
        connect("http://127.0.0.1:3")
    assert os.environ[ADDRESS] == "http://127.0.0.1:3"
