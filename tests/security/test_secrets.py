"""Credentials: warned about where others can read them, and in nothing that a job leaves."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.data._internal.metadata_exporter import sanitize_for_struct

from jobs.config import load_config, parse_options
from jobs.secrets import holds_secret, without_secrets
from pipeline.samples import ReadSettings
from pipeline.storage import Storage
from tests.builders import cli_env, samples, tar_bytes, write_checkpoint
from tests.running import started_cli
from tests.s3 import moto
from tests.stages import part_settings

SECRET = "CANARY-0123456789abcdef"
GIVEN = {"input": ("a.tar",), "output": "out", "model": "m"}


@pytest.mark.parametrize(
    "value",
    [
        {"secret": "x"}, {"client_kwargs": {"aws_secret_access_key": "x"}}, {"token": "x"},
        {"account_key": "x"}, {"connection_string": "x"}, {"headers": {"Authorization": "x"}},
        "http://u:p@h/x", ["s3://b", "https://h/x?X-Amz-Signature=1"], "https://h/x?sig=1&sv=2",
    ],
)  # fmt: skip
def test_secrets_are_recognised(value: object) -> None:
    assert holds_secret(value)


@pytest.mark.parametrize(
    "value",
    [{}, {"endpoint_url": "http://h"}, {"anon": True}, {"profile": "p"}, "s3://b/x", "u:p@h",
     {"secret": None}, "http://h/x?v=2"],
)  # fmt: skip
def test_what_is_no_secret(value: object) -> None:
    assert not holds_secret(value)


def test_a_command_line_without_its_secrets() -> None:
    shown = without_secrets(
        ["extract", "http://u:p@h/a.tar?sig=1", "out", "--model", "m", "--storage-options", SECRET,
         f"--storage-options={SECRET}", "--input=http://u:p@h/a"]
    )  # fmt: skip
    assert shown == [
        "extract", "http://h/a.tar", "out", "--model", "m", "--storage-options", "…",
        "--storage-options=…", "--input=http://h/a",
    ]  # fmt: skip
    plain = ["extract", "s3://b/{0..9}.tar", "out", "--max-tiles=3"]
    assert without_secrets(plain) == plain


def test_a_secret_on_the_command_line_is_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    options = json.dumps({"secret": SECRET})
    load_config(None, {**GIVEN, "storage_options": options})
    (record,) = caplog.records
    assert "every user of this machine" in record.getMessage()
    assert "AWS_PROFILE" in record.getMessage()
    assert SECRET not in record.getMessage()
    caplog.clear()
    parse_options(options)
    assert len(caplog.records) == 1
    caplog.clear()
    load_config(None, {**GIVEN, "storage_options": '{"endpoint_url": "http://h"}'})
    assert caplog.records == []


@pytest.mark.parametrize(
    "options", [f"{{secret: {SECRET}}}", f'\'{{"key": "k", "secret": "{SECRET}"}}\'']
)
@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 1), (0o604, 1), (0o644, 1)])
def test_a_file_with_a_secret_that_others_may_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: str, mode: int, warned: int
) -> None:
    caplog.set_level(logging.WARNING)
    file = tmp_path / "job.yaml"
    file.write_text(f"model: m\nstorage_options: {options}\n")
    file.chmod(mode)
    load_config(file, GIVEN)
    assert len(caplog.records) == warned
    assert SECRET not in caplog.text
    assert not warned or f"chmod 600 {file}" in caplog.text


def test_ray_data_can_not_look_into_settings(tmp_path: Path) -> None:
    """It sends the settings of every stage to an actor, and writes them where exports are on."""
    storage = Storage({"secret": SECRET})
    for settings in (ReadSettings(storage, ("jpg",)), part_settings(tmp_path, storage=storage)):
        assert SECRET not in repr(sanitize_for_struct({"settings": settings}, 10_000))
        assert SECRET not in repr(settings)
    copied = pickle.loads(pickle.dumps(storage))
    assert copied.options == {"secret": SECRET}


def family(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    try:
        me = psutil.Process(process.pid)
        yield from (me, *me.children(recursive=True))
    except psutil.NoSuchProcess:
        return


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "s3://b/in", "s3://b/out", "--model", "checkpoint"),
        ("status", "s3://b/out"),
        ("verify", "s3://b/out"),
        ("index", "s3://b/out", "s3://b/index"),
        ("search", "s3://b/index", "--key", "k"),
        ("browse", "s3://b/index", "--port", "0"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_shows_a_secret_in_ps(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at when it first asks a storage, which never answers."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoint")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(240)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        options = json.dumps({"endpoint_url": endpoint, "key": "k", "secret": SECRET})
        with started_cli(*arguments, "--storage-options", options) as process:
            server.accept()[0].close()
            shown = psutil.Process(process.pid).cmdline()
    assert shown[0].startswith(f"tessera {arguments[0]} s3://b/")
    assert SECRET not in " ".join(shown)


def test_a_real_job(tmp_path: Path) -> None:
    """A job with a secret on its command line, a shard that fails, and Ray's exports on: where the
    secret is, which addresses its processes listen on, and the modes of what Ray leaves."""
    home = tmp_path / "home"
    home.mkdir()
    listening: set[str] = set()
    argv: list[tuple[bool, str]] = []
    folder = tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True)
    with moto() as server, folder as temporary:
        broken = tar_bytes(samples(6))[:3000]
        shards = {"in/0.tar": tar_bytes(samples(6)), "in/1.tar": broken}
        server.make_bucket("canary", shards)
        options = {**server.options, "secret": SECRET}
        env = cli_env({"HOME": str(home), "RAY_TMPDIR": temporary,
                       "RAY_enable_export_api_write": "1"})  # fmt: skip
        model = write_checkpoint(tmp_path / "model")
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "extract", "s3://canary/in", "s3://canary/out",
             "--model", str(model), "--storage-options", json.dumps(options)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while process.poll() is None:
            for relative in family(process):
                try:
                    if SECRET in " ".join(relative.cmdline()):
                        argv.append((relative.pid == process.pid, relative.name()))
                    assert SECRET not in str(relative.environ())
                    for connection in relative.net_connections("inet"):
                        if connection.status == psutil.CONN_LISTEN:
                            listening.add(connection.laddr.ip)
                except psutil.Error:
                    continue
        stdout, stderr = process.communicate()
        assert process.returncode == 1, stderr.decode()
        assert stderr.decode().count("every user of this machine") == 1
        assert b"1 shards failed" in stdout
        assert SECRET.encode() not in stdout + stderr
        assert all(driver for driver, _ in argv), "only the user's own command line had it"
        assert listening
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        objects = server.objects("canary")
        assert "out/commits/0.json" in objects
        assert [n for n, data in objects.items() if SECRET.encode() in data] == []
        files = [f for f in Path(temporary).rglob("*") if f.is_file()]
        assert any(f.name == "event_EXPORT_DRIVER_JOB.log" for f in files)
        assert [f for f in files if SECRET.encode() in f.read_bytes()] == []
        token = home / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert [f for f in files if token.read_bytes() in f.read_bytes()] == []
