"""Whole jobs over S3 through a proxy of faults: what can pass leaves no trace, what cannot is told,
and the next run makes it good."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.builders import picture, run_cli, sample, samples, tar_bytes, write_checkpoint
from tests.fault_proxy import FaultProxy, Rule
from tests.running import without_times
from tests.s3 import S3Server

NUM_SHARDS = 4
TRANSIENT = [
    # reading: each shard meets two
    *(Rule(fault, "GET", "*/in/00000.tar", nth=[1]) for fault in ("reset-mid", "stall-mid")),
    *(Rule(fault, "GET", "*/in/00001.tar", nth=[1]) for fault in ("503", "fin-mid")),
    *(Rule(fault, "GET", "*/in/00002.tar", nth=[1]) for fault in ("stall-before", "500")),
    Rule("slow", "GET", "*/in/00003.tar", nth=[1]),
    Rule("flip-answer", "GET", "*.arrow", nth=[1]),
    *(Rule(fault, "GET", "*.arrow", nth=[2]) for fault in ("shorter-length", "longer-length")),
    *(Rule(fault, "LIST", nth=[1]) for fault in ("503", "reset-before")),
    # writing
    *(Rule(fault, "PUT", "*/embeddings/00000*", nth=[1]) for fault in ("503", "lost-ack")),
    *(Rule(fault, "PUT", "*/embeddings/00001*", nth=[1]) for fault in ("flip-upload", "500")),
    *(Rule(fault, "PUT", "*/rejects/00002*", nth=[1]) for fault in ("reset-before", "lost-ack")),
    *(Rule(fault, "PUT", "*/commits/00003*", nth=[1]) for fault in ("lost-ack", "flip-upload")),
    *(Rule(fault, "PUT", "*.arrow", nth=[1, 4]) for fault in ("flip-upload", "stall-before")),
    *(Rule(fault, probability=0.04) for fault in ("500", "503", "reset-before")),
]
PERMANENT = [
    Rule("404", "GET", "*/in/00000.tar"),
    Rule("flip-answer", "GET", "*/in/00001.tar", at=2000),  # within the first picture
]
EXPIRED = [Rule("expired", "GET", "*/in/*")]


@dataclass(frozen=True)
class Runs:
    """One run of each kind, and what then lay below its output."""

    transient: subprocess.CompletedProcess[str]
    transient_objects: dict[str, bytes]
    counts: dict[str, int]
    permanent: subprocess.CompletedProcess[str]
    permanent_objects: dict[str, bytes]
    expired: subprocess.CompletedProcess[str]
    afterwards: subprocess.CompletedProcess[str]
    afterwards_objects: dict[str, bytes]


@pytest.fixture(scope="module")
def runs(
    s3_server: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runs]:
    server = s3_server("moto")
    model = write_checkpoint(tmp_path_factory.mktemp("model") / "model")
    bucket = "fault-jobs"  # part of what the proxy rolls on: each run meets the same faults
    shards = {
        f"in/{number:05d}.tar": tar_bytes(
            [*samples(4, seed=number, prefix=f"{number:05d}"), *sample("zz", picture(90, 70)[:700])]
        )
        for number in range(NUM_SHARDS)
    }
    server.make_bucket(bucket, shards)

    def extract(output: str, proxy: FaultProxy) -> subprocess.CompletedProcess[str]:
        return run_cli(
            "extract", f"s3://{bucket}/in", f"s3://{bucket}/{output}",
            "--model", model, "--dtype", "float32", "--json",
            "--storage-options", json.dumps({"config_kwargs": {"read_timeout": 2}}),
            env={**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint},
        )  # fmt: skip

    def below(output: str) -> dict[str, bytes]:
        found = server.objects(bucket)
        front = f"{output}/"
        return {k.removeprefix(front): v for k, v in found.items() if k.startswith(front)}

    with FaultProxy(server.endpoint, TRANSIENT, seed=4) as proxy:
        transient = extract("out-a", proxy)
        counts = dict(proxy.counts)
        proxy.rules = PERMANENT
        permanent = extract("out-b", proxy)
        broken = below("out-b")
        proxy.rules = EXPIRED
        expired = extract("out-b", proxy)
        proxy.rules = []
        afterwards = extract("out-b", proxy)
        yield Runs(
            transient,
            below("out-a"),
            counts,
            permanent,
            broken,
            expired,
            afterwards,
            below("out-b"),
        )


def test_faults_that_pass_leave_no_trace(runs: Runs) -> None:
    assert runs.transient.returncode == 0, runs.transient.stderr
    assert set(runs.counts) >= {rule.fault for rule in TRANSIENT}
    assert len(runs.transient_objects) == 1 + 3 * NUM_SHARDS
    assert without_times(runs.transient_objects) == without_times(runs.afterwards_objects)


def test_faults_that_last_are_told_shard_by_shard(runs: Runs) -> None:
    assert runs.permanent.returncode == 1, runs.permanent.stderr
    assert "Traceback" not in runs.permanent.stderr
    failures = json.loads(runs.permanent.stdout)["failures"]
    assert sorted(failures) == ["00000", "00001"]
    assert "in/00000.tar is not there" in failures["00000"]
    assert "in/00001.tar: damaged on the way: what came has md5" in failures["00001"]
    published = [name for name in runs.permanent_objects if not name.startswith("_runs/")]
    assert sorted(published) == [
        "commits/00002.json",
        "commits/00003.json",
        "dataset.json",
        "embeddings/00002.parquet",
        "embeddings/00003.parquet",
        "rejects/00002.parquet",
        "rejects/00003.parquet",
    ]


def test_credentials_that_expire_stop_the_run(runs: Runs) -> None:
    assert runs.expired.returncode == 1, runs.expired.stderr
    told = json.loads(runs.expired.stdout)
    assert told["committed"] == 0
    assert set(told["failures"]) <= {"00000", "00001"}
    for reason in told["failures"].values():
        assert reason.startswith("CredentialsError: cannot read at offset 0 s3://")
        assert "ExpiredToken" in reason
    assert runs.expired.stderr.count("the storage refuses the credentials") == 1


def test_the_next_run_makes_it_good(runs: Runs) -> None:
    assert runs.afterwards.returncode == 0, runs.afterwards.stderr
    told = json.loads(runs.afterwards.stdout)
    assert (told["committed_before"], told["committed"]) == (2, 2)
    assert len(runs.afterwards_objects) == 1 + 3 * NUM_SHARDS
