"""What is handed to Ray's client, and what a user is told of jobs."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from jobs import submit as submit_module
from jobs.ray_jobs import Cluster, Job
from jobs.submission import Submission
from jobs.submit import Place, follow_to_end, parse_resources, show_jobs, submit
from jobs.terminal import BrokenRunError
from model.errors import UserError
from tests.builders import cli_env

SUBMISSION = Submission("python -m jobs.cli extract", {"job.yaml": b"a: 1\n"}, {"verb": "extract"})


def job(status: str, exit_code: int | None = None, message: str = "", **metadata: str) -> Job:
    return Job("j", status, message, "python x.py", metadata, 1_764_000_000.0, None, exit_code)


def handed_over(place: Place) -> dict[str, Any]:
    """What reaches Ray's client, with the names in the folder that it is to send."""
    taken: dict[str, Any] = {}

    def submit_job(**options: Any) -> str:
        folder = Path(options["runtime_env"]["working_dir"])
        taken.update(options, sent={path.name for path in folder.iterdir()})
        return "j"

    cluster = Cluster(SimpleNamespace(submit_job=submit_job))
    assert submit(cluster, SUBMISSION, place, "mine") == "j"
    return taken


def test_code_files_and_metadata_are_handed_over() -> None:
    taken = handed_over(Place())
    assert {"model", "pipeline", "jobs", "job.yaml"} <= taken["sent"]
    assert not Path(taken["runtime_env"]["working_dir"]).exists(), "nothing stays here"
    assert set(taken["runtime_env"]) == {"working_dir", "env_vars"}
    assert taken["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
    assert (taken["submission_id"], taken["metadata"]) == ("mine", {"verb": "extract"})
    assert taken["entrypoint"] == "python -m jobs.cli extract"


def test_a_lost_answer_leaves_the_id() -> None:
    """The cluster may have taken the job, and nobody would know its name."""
    given: list[str] = []

    def submit_job(submission_id: str, **_: object) -> str:
        given.append(submission_id)
        raise requests.ReadTimeout

    cluster = Cluster(SimpleNamespace(submit_job=submit_job))
    with pytest.raises(BrokenRunError, match="may have taken the job: tessera submit") as told:
        submit(cluster, SUBMISSION, Place())
    assert re.fullmatch("tessera-[0-9a-f]{12}", given[0])
    assert str(told.value).endswith(f"--follow {given[0]}")


def test_a_full_disk_is_one_line() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(BrokenRunError, match="the job's files cannot be put into") as told:
            submit(Cluster(None), SUBMISSION, Place())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 200, "not of every file"


def test_the_driver_asks_for_nothing_unless_it_is_told_to() -> None:
    nothing = handed_over(Place())
    assert nothing["entrypoint_num_cpus"] is nothing["entrypoint_resources"] is None
    something = handed_over(Place(1.0, {"driver": 1}))
    assert something["entrypoint_num_cpus"] == 1.0
    assert something["entrypoint_resources"] == {"driver": 1}


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (job("SUCCEEDED", 0), 0, ""),
        (job("FAILED", 2), 2, "tessera: job j: failed with exit status 2\n"),
        (job("STOPPED"), 143, "tessera: job j: stopped\n"),
        (
            job("FAILED", None, "Traceback\n  pip failed: no such package\n"),
            1,
            "tessera: job j: Ray could not run it: pip failed: no such package\n",
        ),
    ],
)
def test_how_a_followed_job_ends(
    ended: Job,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(submit_module, "follow", lambda *_: ended)
    assert follow_to_end(Cluster(None), "j") == status
    assert capsys.readouterr().err == said


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Job:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit_module, "follow", interrupted)
    assert follow_to_end(Cluster(None), "j") == 130
    said = capsys.readouterr().err
    assert "--follow j" in said
    assert "--stop j" in said
    assert said.count("\n") == 1


def test_jobs_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_jobs([job("RUNNING", verb="extract", output="s3://b/o"), job("FAILED", 1)], False)
    ours, other = capsys.readouterr().out.splitlines()
    assert ours.startswith("j  RUNNING    2025-11-24 16:00:00 UTC, ")
    assert ours.endswith("extract s3://b/o")
    assert other.endswith("python x.py")
    show_jobs([job("FAILED", 1)], True)
    assert json.loads(capsys.readouterr().out)[0]["exit_code"] == 1
    show_jobs([], False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "b"}', '{"a": true}'])
def test_resources_are_names_and_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--entrypoint-resources"):
        parse_resources(text)


def test_resources() -> None:
    assert parse_resources(None) is None
    assert parse_resources('{"driver": 0.5}') == {"driver": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected one of"),
        (["--list", "--stop", "x"], "expected one of"),
        (["--list", "--", "a.tar", "out"], "expected one of"),
        (["--", "a.tar", "out"], "model: missing"),
        (["--", "a.tar", "out", "--model", "m", "--entrypoint-x", "1"], "No such option"),
        (["--list"], "--address"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], said: str) -> None:
    env = {k: v for k, v in cli_env().items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "submit", *arguments],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
