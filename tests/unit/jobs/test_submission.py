"""What is submitted: checked first, complete, and without secrets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from jobs.cli import app
from jobs.submission import CONFIG, prepare
from model.errors import UserError
from tests.builders import write_checkpoint

SECRET = "CANARY-0123456789abcdef"


def parsed(entrypoint: str) -> tuple[str, dict[str, Any]]:
    """The verb of a command, and its values as the command would get them."""
    words = shlex.split(entrypoint)
    assert words[:3] == ["python", "-m", "jobs.cli"]
    command = typer.main.get_command(app).commands[words[3]]  # type: ignore[attr-defined]
    return words[3], command.make_context("", words[4:]).params


def test_extract_is_the_default_and_its_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    submission = prepare(
        ["in dir/{0..3}.tar", "s3://b/x.tar", "out", "--model", "Org/Vit", "--max-tiles", "6",
         "--tiling=dynamic", "--no-thumbnail", "--json"]
    )  # fmt: skip
    verb, values = parsed(submission.entrypoint)
    assert verb == "extract"
    assert values["paths"] == [f"{tmp_path}/in dir/{{0..3}}.tar", "s3://b/x.tar", f"{tmp_path}/out"]
    assert (values["model"], values["max_tiles"], values["tiling"]) == ("Org/Vit", "6", "dynamic")
    assert (values["thumbnail"], values["as_json"], values["config"]) == (False, True, None)
    assert submission.files == {}
    assert submission.metadata["output"] == f"{tmp_path}/out"
    assert submission.metadata["input"] == f"{tmp_path}/in dir/{{0..3}}.tar s3://b/x.tar"
    assert "fingerprint" not in submission.metadata


def test_a_config_file_travels_and_its_paths_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "input: [in]\noutput: out\nmodel: Org/Vit\ntiling: dynamic\nmax_upscale: 2.0\n"
    (tmp_path / "my.yaml").write_text(f"# my {SECRET}\n{text}")
    submission = prepare(["extract", "--config", "my.yaml"])
    _, values = parsed(submission.entrypoint)
    assert submission.files.keys() == {CONFIG}
    assert submission.files[CONFIG].decode() == text.replace(" [in]", "\n- in"), "no comments"
    assert str(values["config"]) == CONFIG
    assert values["paths"] == [f"{tmp_path}/in", f"{tmp_path}/out"]


def test_a_list_of_shards_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("# two\ns3://b/a.tar\n\nlocal.tar\n")
    submission = prepare(["@list.txt", "out", "--model", "Org/Vit"])
    _, values = parsed(submission.entrypoint)
    (name,) = submission.files
    assert values["paths"] == [f"@{name}", f"{tmp_path}/out"]
    assert submission.files[name].decode() == f"s3://b/a.tar\n{tmp_path}/local.tar\n"


def test_a_hub_id_gives_a_digest_of_what_decides_the_fingerprint() -> None:
    def digest(*options: str) -> str:
        submission = prepare(["s3://b/in", "s3://b/out", "--model", "Org/Vit", *options])
        assert "fingerprint" not in submission.metadata
        return submission.metadata["settings"]

    others = [
        ("--tiling", "dynamic"), ("--tiling", "dynamic", "--max-tiles", "6"), ("--layer", "-4"),
        ("--revision", "abc"), ("--carry", "txt"), ("--features", "cls,mean"),
    ]  # fmt: skip
    assert len({digest(), *(digest(*options) for options in others)}) == 1 + len(others)
    same = [("--replicas", "4"), ("--batch-tiles", "8"), ("--max-tiles", "6")]
    assert {digest(*options) for options in same} == {digest()}


def test_a_checkpoint_on_this_machine_gives_the_fingerprint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    both = [
        prepare([str(tmp_path), str(tmp_path / "out"), "--model", str(checkpoint), *more])
        for more in ([], ["--tiling", "dynamic"])
    ]
    prints = [submission.metadata["fingerprint"] for submission in both]
    assert len(set(prints)) == 2
    assert {len(fingerprint) for fingerprint in prints} == {64}


def test_verify_is_submitted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    submission = prepare(
        ["verify", "out", "--input", "in", "--recompute", "3", "--model", "./ckpt"]
    )
    verb, values = parsed(submission.entrypoint)
    assert verb == "verify"
    assert (values["output"], values["source"]) == (f"{tmp_path}/out", [f"{tmp_path}/in"])
    assert (values["recompute"], values["model"]) == (3, f"{tmp_path}/ckpt")
    assert submission.metadata["output"] == f"{tmp_path}/out"


def test_index_is_submitted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    submission = prepare(["index", "out", "idx", "--kind", "flat", "--vector", "mean"])
    verb, values = parsed(submission.entrypoint)
    assert verb == "index"
    assert (values["output"], values["index"]) == (f"{tmp_path}/out", f"{tmp_path}/idx")
    assert (values["kind"], values["vector"], values["feature"]) == ("flat", "mean", None)
    assert submission.metadata["output"] == f"{tmp_path}/out"
    assert submission.metadata["index"] == f"{tmp_path}/idx"


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.tar", "out", "--model", "m", "--storage-options", json.dumps({"secret": SECRET})],
        [f"https://u:{SECRET}@h/a.tar", "out", "--model", "m"],
        ["a.tar", f"s3://k:{SECRET}@b/out", "--model", "m"],
        [f"https://h/a.tar?X-Amz-Signature={SECRET}", "out", "--model", "m"],
        ["a.tar", "out", "--model", "m", "--config", "secret.yaml"],
        ["a.tar", "out", "--model", "m", "--config", "text.yaml"],
        ["a.tar", "out", "--model", "m", "--config", "text.yaml", "--storage-options", "{}"],
        ["@secret.txt", "out", "--model", "m"],
        ["verify", "out", "--storage-options", json.dumps({"token": SECRET})],
        ["index", "out", f"s3://k:{SECRET}@b/idx"],
    ],
)
def test_a_secret_is_refused_and_not_repeated(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.yaml").write_text(f"storage_options: {{secret: {SECRET}}}\n")
    (tmp_path / "text.yaml").write_text(
        f'storage_options: \'{{"key": "k", "secret": "{SECRET}"}}\'\n'
    )
    (tmp_path / "secret.txt").write_text(f"https://h/a.tar?sig={SECRET}\n")
    with pytest.raises(UserError, match="everybody who has the cluster's token") as caught:
        prepare(arguments)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to submit"),
        (["a.tar"], "got one of them"),
        (["a.tar", "out"], "model: missing"),
        (["a.tar", "out", "--model", "m", "--tiling", "round"], "tiling"),
        (["@none.txt", "out", "--model", "m"], "none.txt"),
        (["@latin.txt", "out", "--model", "m"], r"latin.txt: cannot read .* byte 4 is not UTF-8"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"in/n\xe9.tar\n")
    with pytest.raises(UserError, match=said):
        prepare(arguments)


def test_plain_storage_options_pass(tmp_path: Path) -> None:
    options = json.dumps({"endpoint_url": "http://minio:9000"})
    submission = prepare(["a.tar", "out", "--model", "m", "--storage-options", options])
    _, values = parsed(submission.entrypoint)
    assert values["storage_options"] == options
