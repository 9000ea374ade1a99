"""Jobs on a real head: followed to the end, over a cut connection, stopped, failed, listed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.ray_jobs import STOPPED_STATUS
from jobs.schedule import last_document
from tests.builders import REPOSITORY, cli_env, run_cli, samples, write_checkpoint, write_tar
from tests.ray_head import Head, ray_head
from tests.relay import relay


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(num_cpus=6) as running:
        yield running


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/ (2 shards), many/ (400 shards), model/ and job.yaml."""
    folder = tmp_path_factory.mktemp("submit")
    for number in range(2):
        write_tar(folder / f"in/{number}.tar", samples(6, seed=number))
    for number in range(400):
        write_tar(folder / f"many/{number:03}.tar", samples(2, seed=9))
    write_checkpoint(folder / "model", image_size=56)
    (folder / "job.yaml").write_text("tiling: dynamic\nmax_tiles: 2\ndtype: float32\n")
    return folder


def submit(head: Head, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    words = ["submit", "--address", head.url, *map(str, arguments)]
    return run_cli(*words, env={**head.env, **env}, timeout=120)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Looks every 0.1 s."""
    never = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        never.wait(0.1)
    raise AssertionError("it never came so far")


def listed(head: Head) -> dict[str, dict[str, object]]:
    done = submit(head, "--list", "--json")
    assert done.returncode == 0, done.stderr
    return {job["id"]: job for job in json.loads(done.stdout)}


def test_a_job_is_followed_to_its_end(head: Head, work: Path) -> None:
    done = submit(
        head, "--job-id", "whole", "--", work / "in", work / "out", "--config", work / "job.yaml",
        "--model", work / "model", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = last_document(done.stdout)
    assert summary is not None
    assert (summary["committed"], summary["samples"]) == (2, 12)
    dataset = json.loads((work / "out/dataset.json").read_text())
    assert dataset["settings"]["max_tiles"] == 2, "the config file came along"
    told = listed(head)["whole"]
    assert told["status"] == "SUCCEEDED"
    assert told["metadata"]["fingerprint"] == dataset["fingerprint"]  # type: ignore[index]
    assert told["metadata"]["output"] == str(work / "out")  # type: ignore[index]


def test_a_job_is_stopped_and_leaves_whole_shards(head: Head, work: Path) -> None:
    done = submit(
        head, "--detach", "--job-id", "endless", "--", "extract", work / "many", work / "part",
        "--config", work / "job.yaml", "--model", work / "model",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "endless\n")
    commits = work / "part/commits"
    wait_for(lambda: commits.is_dir() and any(commits.glob("*.json")))
    assert submit(head, "--stop", "endless").stdout == "job endless: told to end\n"
    followed = submit(head, "--follow", "endless")
    assert followed.returncode == STOPPED_STATUS
    assert followed.stderr == "tessera: job endless: stopped\n"
    committed = len(list(commits.glob("*.json")))
    assert 0 < committed < 400
    assert not list((work / "part/_runs").glob("lease-*")), "it was given time to tidy up"
    assert submit(head, "--stop", "endless").stdout == "job endless: is over already\n"
    assert listed(head)["endless"]["status"] == "STOPPED"


def test_exit_status_and_reason_of_a_job_that_fails(head: Head, work: Path) -> None:
    done = submit(
        head, "--job-id", "none", "--", work / "none", work / "o", "--model", work / "model"
    )
    assert done.returncode == 2
    assert "tessera: " in done.stdout
    assert done.stderr.endswith("tessera: job none: failed with exit status 2\n")
    assert listed(head)["none"]["exit_code"] == 2
    again = submit(
        head, "--job-id", "none", "--", work / "in", work / "o", "--model", work / "model"
    )
    assert again.returncode == 2
    assert again.stderr == "tessera: job none: the cluster has one of that id already\n"


def test_a_cut_connection_costs_no_line_and_no_line_comes_twice(head: Head, tmp_path: Path) -> None:
    """The job says twenty lines, waits for a file, and says twenty more."""
    go_on = tmp_path / "go-on"
    program = (
        "import os, threading, jobs; print(jobs.__file__); [print('line', n) for n in range(20)]\n"
        f"while not os.path.exists({str(go_on)!r}): threading.Event().wait(0.1)\n"
        "[print('line', n) for n in range(20, 40)]; raise SystemExit(7)"
    )
    (tmp_path / "submit.py").write_text(
        "import shlex, sys\n"
        "from jobs.ray_jobs import connect\n"
        "from jobs.submission import Submission\n"
        "from jobs.submit import Place, submit\n"
        f"entry = 'python -c ' + shlex.quote({program!r})\n"
        "submit(connect(sys.argv[1]), Submission(entry, {}, {}), Place(num_cpus=1), 'talk')\n"
    )
    env = cli_env(head.env)
    subprocess.run([sys.executable, tmp_path / "submit.py", head.url], env=env, check=True)
    with relay(int(head.url.rpartition(":")[2])) as between:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "submit", "--address",
             f"http://127.0.0.1:{between.port}", "--follow", "talk"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        seen = []
        while not seen or seen[-1] != "line 19\n":
            seen.append(process.stdout.readline())
            assert seen[-1], process.communicate()
        before = between.connections
        assert between.cut() > 0
        go_on.touch()
        rest, errors = process.communicate(timeout=60)
    assert between.connections > before, "it came back"
    lines = [*seen, *rest.splitlines(keepends=True)]
    said = [line for line in lines if line.startswith("line ")]
    assert said == [f"line {number}\n" for number in range(40)]
    shipped = next(line for line in lines if line.endswith("jobs/__init__.py\n"))
    assert str(head.folder) in shipped, "its code came with it"
    assert str(REPOSITORY) not in shipped
    assert (process.returncode, errors) == (7, "tessera: job talk: failed with exit status 7\n")


def test_another_token_is_refused_in_one_line(head: Head) -> None:
    done = submit(head, "--list", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "refuses this user's token" in done.stderr


def test_the_list_names_every_job(head: Head, work: Path) -> None:
    done = submit(head, "--list")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(lines) == {"whole", "endless", "none", "talk"}
    assert f"extract {work / 'out'}" in lines["whole"]
