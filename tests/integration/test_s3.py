"""The whole job through s3://, on real servers over HTTP."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    files_below,
    picture,
    run_cli,
    sample,
    samples,
    tar_bytes,
    write_checkpoint,
)
from tests.s3 import S3_SERVERS, S3Server

NUM_SHARDS = 4


@dataclass(frozen=True)
class LocalJob:
    """A job from and to this machine's disk: what the same job over S3 must give."""

    shards: dict[str, bytes]
    options: tuple[str, ...]
    files: dict[str, bytes]


@dataclass(frozen=True)
class RemoteJob:
    """What a run over S3 said, and the objects below its output."""

    server: S3Server
    bucket: str
    output: str
    run: subprocess.CompletedProcess[str]

    @property
    def objects(self) -> dict[str, bytes]:
        front = f"{self.output}/"
        found = self.server.objects(self.bucket)
        return {k.removeprefix(front): v for k, v in found.items() if k.startswith(front)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalJob:
    root = tmp_path_factory.mktemp("local")
    options = ("--model", str(write_checkpoint(root / "model")), "--dtype", "float32")
    options += ("--features", "cls,mean", "--carry", "txt,json:url")
    shards = {
        f"{number:05d}.tar": tar_bytes(
            [*samples(4, seed=number, prefix=f"{number:05d}"), *sample("zz", picture(90, 70)[:700])]
        )
        for number in range(NUM_SHARDS)
    }
    (root / "in").mkdir()
    for name, data in shards.items():
        (root / "in" / name).write_bytes(data)
    run = run_cli("extract", root / "in", root / "out", *options)
    assert run.returncode == 0, run.stderr
    return LocalJob(shards, options, files_below(root / "out"))


@pytest.fixture(scope="module", params=S3_SERVERS)
def server(request: pytest.FixtureRequest, s3_server: Callable[[str], S3Server]) -> S3Server:
    return s3_server(request.param)


@pytest.fixture(scope="module")
def bucket(server: S3Server, local: LocalJob) -> str:
    name = f"job-{secrets.token_hex(4)}"
    server.make_bucket(name, {f"in/{key}": data for key, data in local.shards.items()})
    return name


@pytest.fixture(scope="module")
def whole(server: S3Server, bucket: str, local: LocalJob) -> RemoteJob:
    """Credentials from --storage-options."""
    options = ("--storage-options", json.dumps(server.options))
    run = run_cli(
        "extract", f"s3://{bucket}/in/{{00000..00003}}.tar", f"s3://{bucket}/out",
        *local.options, *options,
    )  # fmt: skip
    return RemoteJob(server, bucket, "out", run)


@pytest.fixture(scope="module")
def one_missing(server: S3Server, bucket: str, local: LocalJob) -> RemoteJob:
    """Credentials from AWS's variables; the range names one shard more than there are."""
    run = run_cli(
        "extract", f"s3://{bucket}/in/{{00000..00004}}.tar", f"s3://{bucket}/one-missing",
        *local.options, env=server.environment,
    )  # fmt: skip
    return RemoteJob(server, bucket, "one-missing", run)


def without_circumstances(commit: bytes) -> dict[str, Any]:
    """A commit less the times, and the source's address and version."""
    fields: dict[str, Any] = json.loads(commit)
    for name in ("seconds", "committed_at", "replicas"):
        del fields[name]
    fields["source"] = {"size": fields["source"]["size"]}
    return fields


def assert_same_output(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert len(expected) == 1 + 3 * NUM_SHARDS  # dataset.json; embeddings, rejects, commits
    for name, data in expected.items():
        if name.startswith("commits/"):
            assert without_circumstances(found[name]) == without_circumstances(data), name
        else:
            assert found[name] == data, name


def test_the_output_is_that_of_a_local_run(whole: RemoteJob, local: LocalJob) -> None:
    assert whole.run.returncode == 0, whole.run.stderr
    assert_same_output(whole.objects, local.files)  # and nothing of `_runs` is left


def test_a_commit_names_the_object_it_was_made_from(whole: RemoteJob, local: LocalJob) -> None:
    head = whole.server.client().head_object(Bucket=whole.bucket, Key="in/00002.tar")
    source = json.loads(whole.objects["commits/00002.json"])["source"]
    assert source == {
        "url": f"s3://{whole.bucket}/in/00002.tar",
        "size": len(local.shards["00002.tar"]),
        "etag": head["ETag"].strip('"'),
    }


def test_a_missing_shard_stops_no_other(one_missing: RemoteJob, local: LocalJob) -> None:
    run = one_missing.run
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    missing = f"s3://{one_missing.bucket}/in/00004.tar is not there"
    assert missing in run.stdout
    objects = one_missing.objects
    records = {name: data for name, data in objects.items() if name.startswith("_runs/")}
    assert_same_output({n: d for n, d in objects.items() if n not in records}, local.files)
    (progress,) = (json.loads(data) for data in records.values())
    assert [failure["shard"] for failure in progress["failures"]] == ["00004"]
    assert missing in progress["failures"][0]["reason"]


def test_run_again_it_does_nothing_and_starts_no_ray(
    whole: RemoteJob, local: LocalJob, tmp_path: Path
) -> None:
    before = whole.objects
    run = run_cli(
        "extract", f"s3://{whole.bucket}/in", f"s3://{whole.bucket}/out", *local.options,
        env={**whole.server.environment, "RAY_TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("nothing to do: all 4 shards are committed")
    assert list(tmp_path.iterdir()) == []
    assert whole.objects == before


def test_status_and_verify(whole: RemoteJob) -> None:
    options = ("--storage-options", json.dumps(whole.server.options))
    output = f"s3://{whole.bucket}/out"
    status = run_cli("status", output, "--json", *options)
    assert status.returncode == 0, status.stderr
    told = json.loads(status.stdout)
    assert (told["committed"], told["samples"], told["rejects"]) == (NUM_SHARDS, 20, 4)
    source = f"s3://{whole.bucket}/in/*.tar"
    verified = run_cli("verify", output, "--input", source, "--json", env=whole.server.environment)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    report = json.loads(verified.stdout)
    assert (report["shards"], report["samples"], report["problems"]) == (NUM_SHARDS, 20, [])
    del_one = whole.server.client()
    del_one.copy_object(
        Bucket=whole.bucket, Key="damaged/dataset.json",
        CopySource={"Bucket": whole.bucket, "Key": "out/dataset.json"},
    )  # fmt: skip
    del_one.copy_object(
        Bucket=whole.bucket, Key="damaged/commits/00001.json",
        CopySource={"Bucket": whole.bucket, "Key": "out/commits/00001.json"},
    )  # fmt: skip
    damaged = run_cli("verify", f"s3://{whole.bucket}/damaged", *options)
    assert damaged.returncode == 1, damaged.stdout + damaged.stderr
    assert "embeddings/00001.parquet" in damaged.stdout


def test_report_shows_rejects_of_a_source_on_s3(whole: RemoteJob, tmp_path: Path) -> None:
    output = f"s3://{whole.bucket}/out"
    page = tmp_path / "r.html"
    done = run_cli("report", output, "--out", page, env=whole.server.environment)
    assert done.returncode == 0, done.stderr
    told = page.read_text()
    assert f"<b>{NUM_SHARDS}</b>" in told
    assert "decode/truncated" in told
    assert told.count("data:image/jpeg;base64,") == 3  # as many as are shown of a code
    assert "first row group of 4 of 4 parts" in told
    assert whole.server.secret not in told


def test_no_secret_comes_out(whole: RemoteJob, one_missing: RemoteJob) -> None:
    secret = whole.server.secret
    for job in (whole, one_missing):
        assert job.run.stdout
        assert secret not in job.run.stdout + job.run.stderr
        for name, data in job.objects.items():
            assert secret.encode() not in data, name


BAD = [
    # INPUT, OUTPUT, what the line says
    ("s3://no-such-bucket/in", "s3://{bucket}/bad", "s3://no-such-bucket/in: not found"),
    ("s3://no-such-bucket/{{0..2}}.tar", "s3://{bucket}/bad", "none of the shards was found"),
    ("s3://{bucket}/nowhere/", "s3://{bucket}/bad", "s3://{bucket}/nowhere/: not found"),
    ("s3://{bucket}/nowhere/*.tar", "s3://{bucket}/bad", "no shards in s3://{bucket}/nowhere/"),
    ("s3://{bucket}/in/{{7..9}}.tar", "s3://{bucket}/bad", "(tried s3://{bucket}/in/7.tar"),
    ("s3://{bucket}/in", "s3://no-such-bucket/out", "cannot write to s3://no-such-bucket/out: not"),
]


def assert_one_line(run: subprocess.CompletedProcess[str], says: str) -> None:
    assert run.returncode == 2, run.stderr
    assert says in run.stderr
    assert run.stderr.startswith("tessera: ")
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize(("source", "output", "says"), BAD)
def test_what_is_not_there(
    source: str,
    output: str,
    says: str,
    server: S3Server,
    bucket: str,
    local: LocalJob,
    tmp_path: Path,
) -> None:
    before = server.objects(bucket)
    run = run_cli(
        "extract", source.format(bucket=bucket), output.format(bucket=bucket), *local.options,
        env={**server.environment, "RAY_TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert_one_line(run, says.format(bucket=bucket))
    assert list(tmp_path.iterdir()) == []  # no Ray
    assert server.objects(bucket) == before


@pytest.mark.ceph
def test_a_wrong_secret(
    s3_server: Callable[[str], S3Server], local: LocalJob, tmp_path: Path
) -> None:
    """moto takes any secret."""
    server = s3_server("ceph")
    name = f"job-{secrets.token_hex(4)}"
    server.make_bucket(name, {f"in/{key}": data for key, data in local.shards.items()})
    wrong = {**server.environment, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    for source in ("in", "in/*.tar", "in/00000.tar"):
        run = run_cli(
            "extract", f"s3://{name}/{source}", f"s3://{name}/out", *local.options,
            env={**wrong, "RAY_TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert_one_line(run, "access refused")
        assert "not-the-secret" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_storage_that_are_wrong(local: LocalJob, tmp_path: Path) -> None:
    for options, says in (
        ({"endpoint_url": "nonsense"}, "s3://b/in: cannot be opened: ValueError: Invalid endpoint"),
        ({"keey": "k"}, "keey"),
        ({"key": "lonely"}, "Partial credentials"),
        (
            {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"},
            "cannot list s3://b/in",
        ),
    ):
        run = run_cli(
            "extract", "s3://b/in", tmp_path / "out", *local.options,
            "--storage-options", json.dumps(options), env={"RAY_TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert run.returncode == 2, run.stderr
        assert says in run.stderr.splitlines()[-1]
        assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []
