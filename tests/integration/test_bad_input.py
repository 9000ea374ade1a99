"""Every kind of bad input at the command line: one clear line, the right exit status."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline.cpus import usable_cpus
from tests.builders import (
    files_below,
    picture,
    run_cli,
    sample,
    samples,
    tar_bytes,
    write_checkpoint,
    write_tar,
)
from tests.checkpoints import edit_json, edit_tensors, tiny_checkpoint, tiny_config

CUT_AT = 3 * 512  # inside the last sample's picture, see `bad_shards`


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_tar(folder / "0.tar", samples(2))
    return folder


class Refusal:
    """Runs the command line where no Ray may start, and checks the one line it must end with.

    In this process: the cases are many, and a process of its own costs seconds each time.
    """

    def __init__(
        self,
        good: Path,
        model: Path,
        output: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.good, self.model, self.output = good, model, output
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def __call__(
        self, *options: str | Path, says: tuple[str, ...], model: Path | None = None
    ) -> None:
        paths = (self.good, self.output)
        self.check("extract", *paths, "--model", model or self.model, *options, says=says)
        assert not self.output.exists()

    def check(self, *arguments: str | Path, says: tuple[str, ...]) -> None:
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["tessera", *map(str, arguments)])
            patch.setattr(sys, "stderr", sys.stderr)  # `main` puts its own there
            patch.setattr("jobs.terminal._claimed", False)
            patch.setattr("jobs.extract.connect", _no_ray)
            with pytest.raises(SystemExit) as ended:
                main()
        shown = self._capfd.readouterr()
        run = subprocess.CompletedProcess(arguments, ended.value.code, shown.out, shown.err)  # type: ignore[arg-type]
        assert_one_line(run, *says)


def _no_ray(local: bool) -> None:
    raise AssertionError("Ray was started")


def assert_one_line(run: subprocess.CompletedProcess[str], *says: str) -> None:
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("tessera: ")
    assert run.stderr.count("\n") == 1, run.stderr
    for words in says:
        assert words in run.stderr
    assert run.stdout == ""


@pytest.fixture
def refused(
    good: Path,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refusal:
    return Refusal(good, model, tmp_path / "out", capfd, monkeypatch)


def test_in_a_process_of_its_own(good: Path, model: Path, tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.mkdir()
    arguments = ("extract", good, tmp_path / "out", "--model", model, "--layer", "3")
    assert_one_line(run_cli(*arguments, env={"RAY_TMPDIR": str(ray)}), "layer", "3 blocks")
    assert list(ray.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_tile: 3\n", ("job.yaml: max_tile: unknown key", "did you mean max_tiles?")),
        ("max_tiles: many\n", ("job.yaml: max_tiles: ", "valid integer", "got 'many'")),
        (
            "max_tiles: 0\nfeatures: [cls, nose]\n",
            ("max_tiles: ", "got 0; ", "features: ", "'nose'"),
        ),
        ("thumbnail: 7\n", ("job.yaml: thumbnail: ", "valid boolean", "got 7")),
        ("a: [1\n secret: hidden\n", ("job.yaml: not YAML: ", "line 2, column 8")),
        ("- a\n- list\n", ("job.yaml: expected keys and values, got list",)),
    ],
)
def test_a_config_file(text: str, says: tuple[str, ...], refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    refused("--config", file, says=(str(tmp_path), *says))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-tiles", "many"], ("command line: max_tiles: ", "valid integer", "got 'many'")),
        (["--features", "cls,nose"], ("command line: features: ", "'cls'", "'nose'")),
        (["--replicas", "4:2"], ("replicas: expected 1 <= min <= max",)),
        (["--dtype", "float8"], ("command line: dtype: ", "'float32'", "got 'float8'")),
        (["--storage-options", "{"], ("command line: storage_options: expected a JSON object",)),
        (["--config", "/nowhere.yaml"], ("/nowhere.yaml: cannot be read: No such file",)),
        (["--layer", "3"], ("layer", "3 blocks")),
        (["--layer", "-4"], ("layer", "3 blocks")),
    ],
)
def test_options(options: list[str], says: tuple[str, ...], refused: Refusal) -> None:
    refused(*options, says=says)


def other_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])


def without_a_tensor(folder: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors["encoder.layers.1.mlp.fc2.weight"]

    edit_tensors(folder / "model.safetensors", drop)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x20" + bytes(7) + b"{" * 200)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, ("no such folder",)),
        (other_architecture, ("config.json", "llama")),
        (without_a_tensor, ("tensor encoder.layers.1.mlp.fc2.weight is missing",)),
        (pickle_only, ("pytorch_model.bin", "only safetensors")),
        (cut_weights, ("model.safetensors: has", "fetch it again")),
        (corrupt_weights, ("model.safetensors: the safetensors header is corrupt",)),
        (no_config, ("config.json: no such file",)),
    ],
)
def test_a_checkpoint(
    damage: Callable[[Path], None], says: tuple[str, ...], refused: Refusal, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(refused.model, broken)
    damage(broken)
    refused(says=(str(broken), *says), model=broken)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{good}/*.tgz", "no shards in {good}/*.tgz: expected *.tar"),
        ("{good}/nowhere", "cannot list {good}/nowhere: not found"),
        ("{good}/{{7..9}}.tar", "none of the shards was found (tried {good}/7.tar"),
        ("@{good}/list.txt", "@{good}/list.txt: cannot read the list of shards"),
        ("memory://x/0.tar", "memory:// lives in one process"),
        ("nosuch://x/0.tar", "nosuch://x/0.tar: cannot be opened"),
    ],
)
def test_no_shards(source: str, says: str, refused: Refusal) -> None:
    arguments = ("extract", source.format(good=refused.good), refused.output)
    refused.check(*arguments, "--model", refused.model, says=(says.format(good=refused.good),))
    assert not refused.output.exists()


def test_an_output_that_holds_foreign_files(refused: Refusal) -> None:
    refused.output.mkdir()
    (refused.output / "thesis.txt").write_text("mine")
    arguments = ("extract", refused.good, refused.output, "--model", refused.model)
    refused.check(
        *arguments, says=(str(refused.output), "thesis.txt", "give a new or empty OUTPUT")
    )
    assert files_below(refused.output) == {"thesis.txt": b"mine"}
    refused.check("status", refused.output, says=("no dataset.json there",))


def test_a_tensor_parallel_that_the_cluster_cannot_place(refused: Refusal, tmp_path: Path) -> None:
    """Only Ray knows what the cluster has, so here one starts."""
    cores = usable_cpus()
    wide = replace(tiny_config(), num_heads=cores + 1, hidden_size=16 * (cores + 1))
    options = ("--model", tiny_checkpoint(tmp_path / "wide", wide).folder)
    run = run_cli(
        "extract", refused.good, refused.output, *options, "--tensor-parallel", str(cores + 1)
    )
    assert_one_line(run, f"the cluster has no GPUs, and its largest node has {cores} CPUs")


def test_a_tensor_parallel_beyond_the_heads(refused: Refusal) -> None:
    options = ("--model", refused.model, "--tensor-parallel", "6")
    refused.check(
        "extract", refused.good, refused.output, *options, says=("the checkpoint has 5 heads",)
    )


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header gives this size, with hardly any pixels behind it."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = block(b"IDAT", zlib.compress(bytes(100))) + block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + pixels


BAD_PICTURES = [
    # member, content; and the reject that must come of it
    ("bad0.jpg", picture(90, 70)[:900], ("decode", "truncated")),
    ("bad1.png", png_of(60_000, 60_000), ("decode", "decompression-bomb")),
    ("bad2.png", png_of(0, 7), ("decode", "zero-size")),
    ("bad3.txt", b"no picture beside me", ("read", "no-image")),
    ("bad4.webp", b"not a picture at all", ("decode", "unidentified")),
]


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "good.tar", samples(3, seed=1))
    # 5 of 20 rejected: just what max_reject_rate 0.25 allows
    bad = [(name, content) for name, content, _ in BAD_PICTURES]
    write_tar(folder / "pictures.tar", [*samples(15, seed=2), *bad])
    write_tar(folder / "rejects.tar", [*samples(5, seed=3), *bad[:2]])  # 2 of 7: too many
    whole = tar_bytes([*samples(4, seed=4), *sample("late", picture(150, 150, seed=5))])
    (folder / "cut.tar").write_bytes(whole[: whole.index(b"late.jpg") + CUT_AT])
    (folder / "not-a-tar.tar").write_bytes(picture(200, 200))
    (folder / "empty-file.tar").touch()
    write_tar(folder / "no-samples.tar", [])
    return folder


@pytest.fixture(scope="module")
def first_run(
    bad_shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str], dict[str, bytes]]:
    """OUTPUT, what the run said, and the files that it left."""
    output = tmp_path_factory.mktemp("out")
    options = ("--model", model, "--dtype", "float32", "--json")
    run = run_cli("extract", bad_shards, output, *options)
    return output, run, files_below(output)


@pytest.fixture(scope="module")
def second_run(
    bad_shards: Path,
    model: Path,
    first_run: tuple[Path, subprocess.CompletedProcess[str], dict[str, bytes]],
) -> tuple[Path, subprocess.CompletedProcess[str], dict[str, bytes]]:
    """The same OUTPUT, with --accept-truncated."""
    output = first_run[0]
    options = ("--model", model, "--dtype", "float32", "--accept-truncated")
    run = run_cli("extract", bad_shards, output, *options)
    return output, run, files_below(output)


Run = tuple[Path, subprocess.CompletedProcess[str], dict[str, bytes]]


def commits_of(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        Path(name).stem: json.loads(data)
        for name, data in files.items()
        if name.startswith("commits/")
    }


def rows_of(files: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(files[name])).to_pylist()
    return rows


def assert_accounts_balance(files: dict[str, bytes]) -> None:
    """samples = distinct samples embedded + rejects, from the files themselves."""
    commits = commits_of(files)
    assert commits
    for name, commit in commits.items():
        rows = rows_of(files, f"embeddings/{name}.parquet")
        rejects = rows_of(files, f"rejects/{name}.parquet") if commit["rejects"] else []
        embedded = {row["sample_index"] for row in rows}
        rejected = {row["sample_index"] for row in rejects}
        assert len(rejects) == commit["rejects"]
        assert not embedded & rejected
        assert embedded | rejected == set(range(commit["samples"])), name


def test_good_shards_beside_bad_ones_are_committed(first_run: Run) -> None:
    _, run, files = first_run
    assert run.returncode == 1, run.stderr
    commits = commits_of(files)
    assert sorted(commits) == ["good", "no-samples", "pictures"]
    counts = {name: (c["samples"], c["rejects"]) for name, c in commits.items()}
    assert counts == {"good": (3, 0), "no-samples": (0, 0), "pictures": (20, 5)}
    assert_accounts_balance(files)
    published = {n for n in files if n.startswith(("embeddings/", "rejects/"))}
    assert published == {f"embeddings/{name}.parquet" for name in commits} | {
        "rejects/pictures.parquet"
    }


def test_each_bad_picture_has_its_reject(first_run: Run) -> None:
    rows = rows_of(first_run[2], "rejects/pictures.parquet")
    assert [(row["stage"], row["error"]) for row in rows] == [bad[2] for bad in BAD_PICTURES]
    assert [row["key"] for row in rows] == ["bad0", "bad1", "bad2", "bad3", "bad4"]
    assert [row["sample_index"] for row in rows] == [15, 16, 17, 18, 19]
    assert [row["member"] for row in rows] == ["bad0.jpg", "bad1.png", "bad2.png", "", "bad4.webp"]
    assert all(row["message"] for row in rows)


def test_bad_shards_are_named_with_the_reason(first_run: Run, bad_shards: Path) -> None:
    _, run, _ = first_run
    failures = json.loads(run.stdout)["failures"]
    assert sorted(failures) == ["cut", "empty-file", "not-a-tar", "rejects"]
    size = (bad_shards / "cut.tar").stat().st_size
    assert failures["cut"].startswith(f"{bad_shards}/cut.tar: cut inside late.jpg at byte {size}")
    assert failures["not-a-tar"].startswith(f"{bad_shards}/not-a-tar.tar: not a tar archive")
    assert failures["empty-file"].startswith(f"{bad_shards}/empty-file.tar: ")
    assert failures["rejects"] == (
        "2 of 7 samples were rejected (decode/decompression-bomb 1, decode/truncated 1), "
        "more than max_reject_rate 0.25 allows"
    )
    assert "Traceback" not in run.stderr
    assert "core_worker.cc" not in run.stderr  # Ray's native lines go to its log folder
    for name, reason in failures.items():
        assert f"shard {name} is not committed: {reason}\n" in run.stderr


def test_status_tells_what_failed(first_run: Run) -> None:
    records = [json.loads(d) for n, d in first_run[2].items() if n.startswith("_runs/")]
    assert len(records) == 1
    failed = [failure["shard"] for failure in records[0]["failures"]]
    assert sorted(failed) == ["cut", "empty-file", "not-a-tar", "rejects"]
    assert records[0]["ended"] is True


def test_accept_truncated_takes_the_whole_samples_before_the_cut(
    first_run: Run, second_run: Run, bad_shards: Path
) -> None:
    _, run, files = second_run
    assert run.returncode == 1, run.stderr  # three shards are bad beyond that
    commits = commits_of(files)
    assert sorted(commits) == ["cut", "good", "no-samples", "pictures"]
    cut = commits["cut"]
    assert (cut["samples"], cut["rejects"]) == (5, 1)
    assert cut["truncated_at"] == (bad_shards / "cut.tar").stat().st_size
    assert_accounts_balance(files)
    keys = {row["key"] for row in rows_of(files, "embeddings/cut.parquet")}
    assert keys == {"0000", "0001", "0002", "0003"}
    (reject,) = rows_of(files, "rejects/cut.parquet")
    assert (reject["key"], reject["stage"], reject["error"]) == ("late", "read", "truncated")
    before = {n: d for n, d in first_run[2].items() if not n.startswith("_runs/")}
    assert {name: files[name] for name in before} == before  # what was committed stays as it was


def test_another_fingerprint_is_refused(
    first_run: Run, second_run: Run, bad_shards: Path, refused: Refusal
) -> None:
    output, _, files = second_run
    options = ("--model", refused.model, "--dtype", "float32", "--features", "mean")
    refused.check(
        "extract", bad_shards, output, *options,
        says=(f"{output}: made with other settings (features: ", "give another OUTPUT"),
    )  # fmt: skip
    assert files_below(output) == files
