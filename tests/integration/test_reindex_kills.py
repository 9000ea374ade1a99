"""Drivers killed amid a reindex on S3: readers see old shards and new ones, each of them whole."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.builders import picture, run_cli, sample, tar_bytes, write_checkpoint
from tests.fault_proxy import FaultProxy, Rule
from tests.running import (
    started_cli,
    still_alive,
    wait_for_workers,
    wait_until,
    without_times,
)
from tests.s3 import S3Server

NUM_SHARDS, PICTURES = 6, 6
NEW_COMMITS = (1, 2)  # of each driver that is killed: those after them never reach the store
OPTIONS = ("--tiling", "dynamic", "--max-tiles", "2", "--dtype", "float32", "--carry", "txt")
Objects = dict[str, bytes]


@dataclass(frozen=True)
class Place:
    """A bucket with INPUT and OUTPUT."""

    server: S3Server
    bucket: str
    model: Path

    def command(self, verb: str) -> list[object]:
        url = f"s3://{self.bucket}"
        return [verb, f"{url}/in", f"{url}/out", "--model", self.model, *OPTIONS]

    def put(self, objects: Objects) -> None:
        """Makes the bucket hold these objects and no others."""
        client = self.server.client()
        for key in self.server.objects(self.bucket).keys() - objects.keys():
            client.delete_object(Bucket=self.bucket, Key=key)
        for key, data in objects.items():
            client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def output(self) -> Objects:
        found = self.server.objects(self.bucket)
        return {k.removeprefix("out/"): v for k, v in found.items() if k.startswith("out/")}


def inputs(changed: bool) -> Objects:
    """Shards of a few pictures; `changed`: one in each is another, and one shard is new."""
    shards = {}
    for shard in range(NUM_SHARDS + changed):
        seeds = [100 * shard + n + 50 * (changed and n == 1) for n in range(PICTURES)]
        pictures = [picture(300 + 20 * n, 260, seed=seed) for n, seed in enumerate(seeds)]
        members = [m for n, data in enumerate(pictures) for m in sample(f"{n:03}", data, f"{n}")]
        shards[f"in/{shard:05d}.tar"] = tar_bytes(members)
    return shards


@pytest.fixture
def place(s3_server: Callable[[str], S3Server], tmp_path: Path) -> Place:
    server = s3_server("moto")
    bucket = f"reindex-{secrets.token_hex(4)}"
    server.make_bucket(bucket, inputs(changed=False))
    return Place(server, bucket, write_checkpoint(tmp_path / "model", image_size=448))


def commits(output: Objects) -> Objects:
    return {name: data for name, data in output.items() if name.startswith("commits/")}


def assert_whole(output: Objects) -> None:
    """Each commit's objects are there, as it says."""
    for data in commits(output).values():
        parts = json.loads(data)["parts"]
        assert parts
        for part in parts:
            assert hashlib.sha256(output[part["path"]]).hexdigest() == part["sha256"]


@pytest.mark.timeout(2700)
def test_kills_amid_a_reindex_lose_nothing_and_compute_nothing_twice(place: Place) -> None:
    environment = place.server.environment
    done = run_cli(*map(str, place.command("extract")), env=environment)
    assert done.returncode == 0, done.stderr
    old = place.output()
    before = {**{f"out/{k}": v for k, v in old.items()}, **inputs(changed=True)}
    place.put(before)
    done = run_cli(*map(str, place.command("reindex")), "--json", env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["committed"], told["reused_tiles"] > 0) == (NUM_SHARDS + 1, True)
    undisturbed = place.output()
    assert_whole(undisturbed)

    place.put(before)
    renewed: Objects = {}
    orphans: list[psutil.Process] = []
    for num_new in NEW_COMMITS:
        late = Rule("stall-before", "PUT", "*/out/commits/*", nth=range(num_new + 1, 100))
        with (
            FaultProxy(place.server.endpoint, [late]) as proxy,
            started_cli(
                *place.command("reindex"),
                env={**environment, "AWS_ENDPOINT_URL": proxy.endpoint},
            ) as process,
        ):

            def stuck() -> bool:
                put = [r.fault for r in proxy.seen("PUT", "*/out/commits/*")]
                return put.count(None) == num_new and late.fault in put  # noqa: B023

            wait_until(process, stuck)
            assert process.poll() is None, process.communicate()[1].decode()[-2000:]
            tree = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            wait_for_workers(tree)
            orphans += tree
        output = place.output()
        assert_whole(output)
        now = {k: v for k, v in commits(output).items() if v != commits(old).get(k)}
        assert {name: now.get(name) for name in renewed} == renewed, "computed twice"
        renewed = now
    assert len(renewed) == sum(NEW_COMMITS)
    done = run_cli(*map(str, place.command("reindex")), "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["committed"] == NUM_SHARDS + 1 - len(renewed)
    output = place.output()
    assert {name: output[name] for name in renewed} == renewed, "computed twice"
    assert without_times(output) == without_times(undisturbed)
    assert not still_alive(orphans)
