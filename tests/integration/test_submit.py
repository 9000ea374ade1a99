"""Jobs on a real head: followed to the end, over a cut connection, stopped, failed, listed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.ray_jobs import STOPPED_STATUS
from jobs.schedule import last_document
from jobs.schedule_history import read_history
from tests.builders import (
    REPOSITORY,
    cli_env,
    run_cli,
    samples,
    tar_bytes,
    write_checkpoint,
    write_tar,
)
from tests.ray_head import Head, ray_head
from tests.relay import relay
from tests.running import PATIENCE_SECONDS

MANY = 5000  # minutes of work: none ends them before it is told to


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(num_cpus=6) as running:
        yield running


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/ (2 shards), many/ (MANY shards), model/ and job.yaml."""
    folder = tmp_path_factory.mktemp("submit")
    for number in range(2):
        write_tar(folder / f"in/{number}.tar", samples(6, seed=number))
    tar = tar_bytes(samples(2, seed=9))
    (folder / "many").mkdir()
    for number in range(MANY):
        (folder / f"many/{number:04}.tar").write_bytes(tar)
    write_checkpoint(folder / "model", image_size=56)
    (folder / "job.yaml").write_text("tiling: dynamic\nmax_tiles: 2\ndtype: float32\n")
    return folder


def submit(head: Head, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    words = ["submit", "--address", head.url, *map(str, arguments)]
    return run_cli(*words, env={**head.env, **env})


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Looks every 0.1 s."""
    never = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        never.wait(0.1)
    raise AssertionError("it never came so far")


@contextmanager
def ended_at_last(
    command: Sequence[object], env: dict[str, str], **pipes: int
) -> Iterator[subprocess.Popen[str]]:
    """A process whose stdout is read, and which is gone afterwards."""
    process = subprocess.Popen(
        [str(word) for word in command], env=env, stdout=subprocess.PIPE, text=True, **pipes
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


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


def test_an_index_is_built_there(head: Head, work: Path) -> None:
    words = ("index", work / "out", work / "index", "--json")
    done = submit(head, "--job-id", "index", "--", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    told = last_document(done.stdout)
    assert told is not None
    assert (told["vectors"], told["added"]) == (12, ["0", "1"])


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
    assert 0 < committed < MANY
    assert not list((work / "part/_runs").glob("lease-*")), "it was given time to tidy up"


def test_exit_status_and_reason_of_a_job_that_fails(head: Head, work: Path) -> None:
    done = submit(head, "--job-id", "none", "--", "verify", work / "none")
    assert done.returncode == 2
    assert "tessera: " in done.stdout
    assert done.stderr.endswith("tessera: job none: failed with exit status 2\n")
    again = submit(head, "--job-id", "none", "--", "verify", work / "out")
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
    with (
        relay(int(head.url.rpartition(":")[2])) as between,
        ended_at_last(
            [sys.executable, "-m", "jobs.cli", "submit", "--address",
             f"http://127.0.0.1:{between.port}", "--follow", "talk"],
            env, stderr=subprocess.PIPE,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        seen = []
        while not seen or seen[-1] != "line 19\n":
            seen.append(process.stdout.readline())
            assert seen[-1], process.communicate()
        before = between.connections
        assert between.cut() > 0
        go_on.touch()
        rest, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert between.connections > before, "it came back"
    lines = [*seen, *rest.splitlines(keepends=True)]
    said = [line for line in lines if line.startswith("line ")]
    assert said == [f"line {number}\n" for number in range(40)]
    shipped = next(line for line in lines if line.endswith("jobs/__init__.py\n"))
    assert str(head.folder) in shipped, "its code came with it"
    assert str(REPOSITORY) not in shipped
    assert (process.returncode, errors) == (7, "tessera: job talk: failed with exit status 7\n")


def test_a_schedule_computes_what_changed_and_nothing_else(head: Head, tmp_path: Path) -> None:
    """Three runs: all of it; one shard added, one changed in one picture, one gone; nothing."""
    pytest.importorskip("jobs.reindex")
    source, output, history = tmp_path / "in", tmp_path / "out", tmp_path / "history.jsonl"
    for number in range(3):
        write_tar(source / f"{number}.tar", samples(4, seed=number))
    checkpoint = write_checkpoint(tmp_path / "model")
    command = [
        sys.executable, "-m", "tests.stepped_schedule", head.url, history,
        source, output, "--model", checkpoint, "--dtype", "float32",
    ]  # fmt: skip
    with ended_at_last(command, cli_env(head.env), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None

        def next_end() -> str:
            assert process.stdout is not None
            for line in process.stdout:
                if ", exit " in line:
                    return line
            raise AssertionError(process.wait())

        assert "SUCCEEDED, exit 0" in next_end()
        write_tar(source / "3.tar", samples(2, seed=30))
        size = len(samples(1))
        write_tar(source / "1.tar", samples(4, seed=99)[:size] + samples(4, seed=1)[size:])
        (source / "2.tar").unlink()
        for _ in range(2):
            process.stdin.write("\n")
            process.stdin.flush()
            next_end()
        process.communicate(timeout=PATIENCE_SECONDS)  # closes stdin: it ends
    assert process.returncode == 0
    ends = [run.end for run in read_history(history)]
    changes = [end.changed for end in ends if end is not None and end.changed is not None]
    assert len(changes) == len(ends) == 3
    computed = [(change["committed"], change["computed_tiles"]) for change in changes]
    assert computed == [(3, 12), (2, 3), (0, 0)], "two new pictures and the changed one"
    classes = changes[1]["plan"]["classes"]
    assert {name: kind["shards"] for name, kind in classes.items() if kind["shards"]} == {
        "new": 1, "changed": 1, "unchanged": 1, "vanished": 1,
    }  # fmt: skip


def test_another_token_is_refused_in_one_line(head: Head) -> None:
    done = submit(head, "--list", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "refuses this user's token" in done.stderr


def test_the_list_tells_of_every_job(head: Head, work: Path) -> None:
    done = submit(head, "--list", "--json")
    assert done.returncode == 0, done.stderr
    told = {job["id"]: job for job in json.loads(done.stdout) if "reindex-" not in job["id"]}
    assert {name: (job["status"], job["exit_code"]) for name, job in told.items()} == {
        "whole": ("SUCCEEDED", 0),
        "index": ("SUCCEEDED", 0),
        "endless": ("STOPPED", None),
        "none": ("FAILED", 2),
        "talk": ("FAILED", 7),
    }
    dataset = json.loads((work / "out/dataset.json").read_text())
    assert told["whole"]["metadata"] == {
        "verb": "extract",
        "input": str(work / "in"),
        "output": str(work / "out"),
        "fingerprint": dataset["fingerprint"],
        "tessera_version": dataset["tessera_version"],
    }
