"""Two real S3 servers on loopback: moto's in this process, and Ceph's radosgw.

moto is everywhere where the tests' packages are, and accepts any secret. Ceph checks secrets as AWS
does, needs Debian's packages, and is asked for by name: `make test-s3`.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from tests.ports import free_ports

CEPH_MINI = Path(__file__).with_name("ceph_mini.sh")
START_SECONDS = 180
ATTEMPTS = 3  # another may have bound a port of ours in between


@dataclass(frozen=True)
class S3Server:
    """Where a server listens and how one signs in. `checks_secrets`: refuses a wrong one."""

    endpoint: str
    key: str
    secret: str
    checks_secrets: bool

    @property
    def options(self) -> dict[str, str]:
        """As `storage_options` take them."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        """The same as AWS's usual variables."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def make_bucket(self, name: str, objects: dict[str, bytes] | None = None) -> str:
        """Makes a bucket with these objects; gives its URL."""
        client = self.client()
        client.create_bucket(Bucket=name)
        for key, data in (objects or {}).items():
            client.put_object(Bucket=name, Key=key, Body=data)
        return f"s3://{name}"

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Key -> content of everything in a bucket."""
        client = self.client()
        found = client.list_objects_v2(Bucket=bucket)
        assert not found["IsTruncated"]
        return {
            entry["Key"]: client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            for entry in found.get("Contents", [])
        }


@contextmanager
def moto() -> Iterator[S3Server]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(response: S3Response) -> Any:
        """A condition and the put that it is for, as one: moto looks, and puts later."""
        with one_at_a_time:
            return put(response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        server.start()
        try:
            host, port = server.get_host_and_port()
            yield S3Server(f"http://{host}:{port}", "moto-key", "moto-secret-4711", False)
        finally:
            server.stop()


@contextmanager
def ceph() -> Iterator[S3Server]:
    """Fails, never skips, where Ceph's programs are missing: who asks for it wants its answer."""
    said = ""
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="ceph-") as folder:
            port, monitor = free_ports(2)
            start = [str(CEPH_MINI), "start", folder, str(port), str(monitor)]
            try:
                started = subprocess.run(
                    start, capture_output=True, text=True, timeout=2 * START_SECONDS
                )
                if started.returncode == 0:
                    yield S3Server(f"http://127.0.0.1:{port}", "test", "testsecret", True)
                    return
                said = started.stderr
            finally:
                subprocess.run([str(CEPH_MINI), "stop", folder], check=True, timeout=START_SECONDS)
    pytest.fail(said, pytrace=False)


S3_SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.ceph)]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Callable[[str], S3Server]]:
    """Gives a server by its name; each is started once, when it is first asked for."""
    with ExitStack() as running:
        servers: dict[str, S3Server] = {}

        def give(name: str) -> S3Server:
            if name not in servers:
                servers[name] = running.enter_context({"moto": moto, "ceph": ceph}[name]())
            return servers[name]

        yield give


@pytest.fixture(scope="session", params=S3_SERVERS)
def s3(request: pytest.FixtureRequest, s3_server: Callable[[str], S3Server]) -> S3Server:
    return s3_server(request.param)
