"""Real kills of a real job: nothing lost, nothing doubled, nothing computed twice."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import psutil
import pytest

from tests.builders import (
    files_below,
    picture,
    run_cli,
    sample,
    write_checkpoint,
    write_tar,
)
from tests.fault_proxy import FaultProxy, Rule
from tests.running import (
    PATIENCE_SECONDS,
    commits_below,
    comparable,
    endless_shard,
    started_cli,
    still_alive,
    wait_for_workers,
    wait_until,
)
from tests.s3 import S3Server

pytestmark = pytest.mark.timeout(2700)

NUM_SHARDS = 10
PICTURES = 8
KILLS = 3  # many more, of every process of a cluster: test_chaos.py and `make chaos`
OPTIONS = (
    "--tiling",
    "dynamic",
    "--max-tiles",
    "2",
    "--dtype",
    "float32",
    "--features",
    "cls,mean",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards whose work takes some seconds, so that kills fall into every phase."""
    folder = tmp_path_factory.mktemp("resume")
    for shard in range(NUM_SHARDS):
        members = []
        for index in range(PICTURES):
            image = picture(300 + 20 * index, 260, seed=100 * shard + index)
            if shard % 3 == 0 and index == 2:
                image = image[:1000]
            members += sample(f"{index:03d}", image, f"caption {index}")
        write_tar(folder / "in" / f"{shard:05d}.tar", members)
    return folder / "in", write_checkpoint(folder / "model", image_size=448)


@pytest.fixture(scope="module")
def undisturbed(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
    assert done.returncode == 0, done.stderr
    return output


def started(
    job: tuple[Path, Path], output: Path
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return started_cli("extract", job[0], output, "--model", job[1], *OPTIONS)


def kill_driver(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """SIGKILL to the driver alone; gives what it had started, which must end by itself."""
    tree: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return tree


@pytest.fixture(scope="module")
def orphans() -> list[psutil.Process]:
    """What killed drivers had started; the last test of this file waits for their end."""
    return []


def test_kills_of_a_driver_with_its_own_ray_change_no_byte(
    job: tuple[Path, Path], undisturbed: Path, orphans: list[psutil.Process], tmp_path: Path
) -> None:
    rng = random.Random(20261122)
    output = tmp_path / "out"
    committed: dict[str, bytes] = {}
    for kill in range(KILLS):
        with endless_shard(job[0]), started(job, output) as process:
            if kill % 2:  # soon after the next commit, while others are in flight
                seen = min(len(committed), NUM_SHARDS - 1)
                wait_until(process, lambda: len(commits_below(output)) > seen)  # noqa: B023
                delay = rng.uniform(0.0, 0.3)
            else:  # anywhere: start of Ray, loading, reading, embedding, writing
                delay = rng.uniform(1.0, 11.0)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay)
            tree = kill_driver(process)
            wait_for_workers(tree)
            orphans += tree
        now = commits_below(output)
        assert {name: now.get(name) for name in committed} == committed, "computed twice"
        committed = now
    assert committed, "no kill came after a commit: nothing was resumed"
    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["committed_before"] == len(committed)
    assert summary["committed"] == NUM_SHARDS - len(committed)
    after = commits_below(output)
    assert {name: after[name] for name in committed} == committed, "computed twice"
    assert comparable(output) == comparable(undisturbed)
    assert len(comparable(output)) == 1 + 2 * NUM_SHARDS + len(range(0, NUM_SHARDS, 3))


def test_two_at_once(
    job: tuple[Path, Path], undisturbed: Path, orphans: list[psutil.Process], tmp_path: Path
) -> None:
    """One wins, the other says so and stops; also where a first one was killed."""
    output = tmp_path / "out"
    with endless_shard(job[0]), started(job, output) as first:
        wait_until(first, lambda: commits_below(output))
        second = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
        assert second.returncode == 2
        assert second.stderr.startswith(f"tessera: {output}: another run is at work there (process")
        assert f"process {first.pid} on" in second.stderr
        assert second.stderr.count("\n") == 1
        orphans += kill_driver(first)
    assert [name for name in files_below(output / "_runs") if name.startswith("lease-")]
    with endless_shard(job[0]), started(job, output) as third, started(job, output) as fourth:
        wait_until(third, lambda: fourth.poll() is not None, may_end=True)
        loser, winner = sorted((third, fourth), key=lambda process: process.poll() is None)
        assert b"another run is at work there" in loser.communicate()[1]
        assert loser.returncode == 2
        wait_until(winner, lambda: len(commits_below(output)) == NUM_SHARDS)
        winner.terminate()
        _, said = winner.communicate(timeout=PATIENCE_SECONDS)
        assert winner.returncode == 128 + signal.SIGTERM, said.decode()
    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert comparable(output) == comparable(undisturbed)
    assert not (output / "_runs").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_commits_what_is_complete_and_resumes(
    job: tuple[Path, Path], undisturbed: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "out"
    earlier = clusters()
    with endless_shard(job[0]), started(job, output) as process:
        wait_until(process, lambda: commits_below(output))
        tree = psutil.Process(process.pid).children(recursive=True)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)  # as a terminal does: to all of the group
        else:
            process.send_signal(signum)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + signum, stderr.decode()
        assert b"Traceback" not in stderr
        assert not still_alive(tree)
        of_this = [name for name in clusters() - earlier if name.endswith(f"_{process.pid}")]
        assert len(of_this) == 1, "Ray was started again while the job ended"
    committed = commits_below(output)
    assert committed
    assert "~.json" not in committed
    # A write task that Ray was still ending may leave its part behind, which the next run removes.
    left = [name for name in files_below(output) if re.match("_runs/(?!.*/parts/)", name)]
    assert [Path(name).name for name in left] == ["progress.json"]
    record = json.loads((output / left[0]).read_bytes())
    assert record["ended"] is True
    assert record["committed"] == len(committed)

    done = run_cli("extract", job[0], output, "--model", job[1], *OPTIONS)
    assert done.returncode == 0, done.stderr
    after = commits_below(output)
    assert {name: after[name] for name in committed} == committed
    assert comparable(output) == comparable(undisturbed)


def clusters() -> set[str]:
    """Sessions of Ray's on this machine; process ids, of which their names have one, come again."""
    return {path.name for path in Path(f"/tmp/tessera-{os.getuid()}/ray").glob("session_*")}


def test_a_stopped_job_waits_for_a_commit_that_is_slow(
    job: tuple[Path, Path], s3_server: Callable[[str], S3Server]
) -> None:
    """Ray's native handler of SIGTERM would abort the process after three seconds."""
    server = s3_server("moto")
    output = server.make_bucket(f"slow-{secrets.token_hex(4)}") + "/out"
    slow = Rule("stall-before", "PUT", "*/out/commits/*", nth=[1])  # ten seconds, and once more
    with FaultProxy(server.endpoint, [slow]) as proxy:
        env = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        command = ["extract", job[0], output, "--model", job[1], *OPTIONS]
        with endless_shard(job[0]), started_cli(*command, env=env) as process:
            wait_until(process, lambda: proxy.counts[slow.fault])
            process.terminate()
            _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 128 + signal.SIGTERM, stderr.decode()
    (late,) = {request.key for request in proxy.seen("PUT") if request.fault}
    assert late.split("/", 1)[1] in server.objects(output.split("/")[2])


def test_ctrl_c_twice_ends_at_once(
    job: tuple[Path, Path], s3_server: Callable[[str], S3Server]
) -> None:
    """After the first it waits for a commit that never ends."""
    server = s3_server("moto")
    output = server.make_bucket(f"twice-{secrets.token_hex(4)}") + "/out"
    never = Rule("stall-before", "PUT", "*/out/commits/*")
    with FaultProxy(server.endpoint, [never]) as proxy:
        env = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        command = ["extract", job[0], output, "--model", job[1], *OPTIONS]
        with started_cli(*command, env=env) as process:
            wait_until(process, lambda: proxy.seen("PUT", "*/out/commits/*"))
            tree = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            wait_until(process, lambda: not catches(process.pid, signal.SIGTERM))
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 128 + signal.SIGINT, stderr.decode()
            assert not still_alive(tree)
    assert not [name for name in server.objects(output.split("/")[2]) if "/commits/" in name]


def catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler of its own; ours are taken back once the first has run."""
    if not psutil.pid_exists(pid):
        return False
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_job_stopped_while_ray_starts_ends_as_any_other(
    job: tuple[Path, Path], tmp_path: Path, signum: signal.Signals
) -> None:
    """Ray's own handler of SIGTERM would end the process in the middle of it."""
    with started(job, tmp_path / "out") as process:
        driver = psutil.Process(process.pid)
        wait_until(process, lambda: any(map(is_gcs, driver.children(recursive=True))))
        tree = driver.children(recursive=True)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + signum, stderr.decode()
        assert b"Traceback" not in stderr
        assert not still_alive(tree)
    assert not commits_below(tmp_path / "out")
    assert not list((tmp_path / "out/_runs").glob("lease-*"))


def is_gcs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "gcs_server" in process.name()
    return False


def test_a_finished_job_does_nothing(job: tuple[Path, Path], undisturbed: Path) -> None:
    before = files_below(undisturbed)
    done = run_cli("extract", job[0], undisturbed, "--model", job[1], *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nothing to do: all {NUM_SHARDS} shards are committed\n"
    assert files_below(undisturbed) == before


def test_nothing_is_left_of_killed_drivers(orphans: list[psutil.Process]) -> None:
    """Ray's agents wait for a head that died while it started; a minute later they give up."""
    assert orphans, "no driver was killed"
    assert not still_alive(orphans)
