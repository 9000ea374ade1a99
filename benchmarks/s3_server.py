"""A real S3 server on loopback: Ceph's, where it is installed, else moto's."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from benchmarks.record import REPOSITORY

CEPH = REPOSITORY / "tests" / "ceph_mini.sh"
START_SECONDS = 60


@dataclass(frozen=True)
class S3Server:
    name: str
    options: dict[str, Any] = field(repr=False)  # storage_options

    def upload(self, file: Path) -> str:
        """Puts a file into a bucket of the benchmark; gives its URL."""
        fs = fsspec.filesystem("s3", **self.options)
        fs.makedirs("benchmark", exist_ok=True)
        fs.put_file(str(file), f"benchmark/{file.name}")
        return f"s3://benchmark/{file.name}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Runs a server whose files lie below `folder` until the block ends."""
    port = _free_port()
    options = {
        "key": "test",
        "secret": "testsecret",
        "endpoint_url": f"http://127.0.0.1:{port}",
    }
    if shutil.which("radosgw"):
        ceph = ["bash", str(CEPH)]
        subprocess.run([*ceph, "start", str(folder), str(port), str(_free_port())], check=True)
        try:
            yield S3Server("Ceph radosgw", options)
        finally:
            subprocess.run([*ceph, "stop", str(folder)], check=True)
        return
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:  # werkzeug says so when it listens
            if "Running on" in line:
                break
        yield S3Server("moto", options)
    finally:
        process.kill()
        process.communicate(timeout=START_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
