"""Errors of a storage's client are known once it is loaded, and it is not loaded to know them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
)

from pipeline import retries
from pipeline.faults import CredentialsError
from pipeline.retries import ATTEMPTS, retried
from tests.builders import cli_env

# A command on local files; then a client that is loaded only after `pipeline.faults`.
FRESH = """
import json, sys
from jobs.cli import main
from pipeline import retries
from pipeline.storage import Storage
sys.argv = ["tessera", "status", sys.argv[1]]
try:
    main()
except SystemExit as end:
    code = end.code
try:
    Storage().read(sys.argv[-1] + "/none")
except FileNotFoundError:
    found = {name.partition(".")[0] for name in sys.modules}
import fsspec
from botocore.exceptions import EndpointConnectionError
retries.time.sleep = lambda seconds: None
faults = [EndpointConnectionError(endpoint_url="http://x")] * 2
def request():
    if faults:
        raise faults.pop()
    return "came"
came = retries.retried(fsspec.filesystem("file"), 9.0, request, what="read", url="u")
print(json.dumps([code, sorted(found & {"aiohttp", "botocore", "pandas"}), came]))
"""


def test_a_command_on_local_files_loads_no_client_of_a_storage(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], env=cli_env(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [2, [], "came"]
    assert "is it an OUTPUT of `extract`" in run.stderr


@pytest.mark.parametrize(
    ("error", "kind", "line", "num_attempts"),
    [
        (
            EndpointConnectionError(endpoint_url="http://me:pw@x/"),
            OSError,
            f"EndpointConnectionError: Could not connect .*http://x/.* \\({ATTEMPTS} attempts\\)",
            ATTEMPTS,
        ),
        (
            CredentialRetrievalError(provider="sso", error_msg="down"),
            CredentialsError,
            f"CredentialRetrievalError: .*sso: down \\({ATTEMPTS} attempts\\)",
            ATTEMPTS,
        ),
        (
            NoCredentialsError(),
            CredentialsError,
            r"access refused \(NoCredentialsError: Unable to locate credentials\)",
            1,
        ),
    ],
)
def test_botocores_errors(
    error: BotoCoreError,
    kind: type[OSError],
    line: str,
    num_attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=lambda seconds: None))
    asked = []

    def request() -> None:
        asked.append(1)
        raise error

    with pytest.raises(OSError, match=f"^cannot read s3://b/k: {line}$") as caught:
        retried(fsspec.filesystem("file"), 9.0, request, what="read", url="s3://b/k")
    assert type(caught.value) is kind
    assert len(asked) == num_attempts
