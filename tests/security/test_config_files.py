"""Config files, options and records, whoever wrote them: read as plain data, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.config import load_config, parse_options
from jobs.yaml_file import MAX_BYTES, read_yaml
from model.errors import UserError
from tests.builders import run_cli
from tests.security.canary import Canary

GIVEN = {"input": ("a.tar",), "output": "out"}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "job.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases are not read, line 2, column 10"),
        ("model: &m x\nrevision: *m\n", "aliases are not read, line 2, column 11"),
        ("base: &b {model: x}\n<<: *b\n", "aliases are not read"),
        ("model: x\nmodel: y\n", "a key stands twice in one mapping, line 2, column 1"),
        ("storage_options: {key: a, key: b}\n", "a key stands twice"),
        ("model: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        ("model: !!python/name:os.system\n", "could not determine a constructor"),
        ("model: !ray x\n", "could not determine a constructor"),
        ("model: " + "[" * 5000, "nested too deeply"),
        ("model: 2026-13-45\n", "ValueError"),
        ("model: !!int ''\n", "not YAML"),
        ("model: !!float x\n", "not YAML"),
        ("[1]: x\n", "not YAML"),
        ("model: \x01\n", "ReaderError"),
        (b"\xff\xfe\xff", "not YAML"),
        ("a: b: c", "not YAML"),
        ("- a\n", "expected keys and values, got list"),
        ("x" * (MAX_BYTES + 1), "more than 1048576 bytes"),
        ("model: x\n---\nmodel: y\n", "not YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(written(tmp_path, text), GIVEN)
    message = str(refused.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 300


def test_python_tags_execute_nothing(tmp_path: Path) -> None:
    canary = Canary(tmp_path / "executed")
    text = f"model: !!python/object/apply:builtins.exec [{canary.source()!r}]\n"
    with pytest.raises(UserError):
        read_yaml(written(tmp_path, text))
    assert not canary.file.exists()


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        read_yaml(Path("/dev/zero"))


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    text = "model: m\nmax_tiles: 6\nfeatures: [cls, mean]\nstorage_options: {a: {b: 1}}\n"
    config = load_config(written(tmp_path, text), GIVEN)
    assert (config.model, config.max_tiles, config.features) == ("m", 6, ("cls", "mean"))
    assert config.storage_options == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[1]", '"x"', "1" * 5000, "nul", '{"a": ' * 50_000]
)
def test_bad_options_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"storage_options: expected a JSON object") as refused:
        parse_options(text)
    assert len(str(refused.value)) < 300
    with pytest.raises(UserError, match=r"storage_options"):
        load_config(None, {**GIVEN, "model": "m", "storage_options": text})


@pytest.mark.parametrize(
    "given",
    [
        {"storage_options": "CANARY"},
        {"storage_options": ["CANARY"]},
        {"storage_option": {"secret": "CANARY"}},
        {"storage-options": '{"secret": "CANARY"}'},
        {"output": ["s3://user:CANARY@host/x"]},
        {"model": ["http://h/x?X-Amz-Signature=CANARY"]},
        {"max_tiles": "http://user:CANARY@host/x"},
        {"tiling": "http://host/x?token=CANARY"},
    ],
)
def test_an_error_repeats_no_secret(tmp_path: Path, given: dict[str, Any]) -> None:
    """pydantic's own message shows every value."""
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({"model": "m", **GIVEN, "input": ["a.tar"], **given}))
    for config, options in ((file, {}), (None, {"model": "m", **GIVEN, **given})):
        with pytest.raises(UserError) as refused:
            load_config(config, options)
        assert "CANARY" not in str(refused.value)


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, {**GIVEN, "model": "m", "max_tiles": "9" * 100_000})
    assert len(str(refused.value)) < 300


def test_the_command_gives_status_2_and_one_line(tmp_path: Path) -> None:
    done = run_cli("extract", "--config", written(tmp_path, BOMB))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("tessera: ")
    assert done.stdout == ""
