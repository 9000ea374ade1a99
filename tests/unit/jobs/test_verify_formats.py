"""`verify` proves every format, and finds in each what can be wrong there."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.report import write_report
from jobs.report_sizes import Sizes, sample_sizes
from jobs.status import read_status
from pipeline.commits import Format, read_commits
from pipeline.webdataset_format import documents_at_head
from tests.builders import files_below
from tests.outputs import check, edit_commit, extract_plainly
from tests.stages import STORAGE

FEATURES: dict[Format, tuple[str, ...]] = {
    "webdataset": ("cls", "tokens", "tokens-2x2"),
    "npy": ("cls", "mean"),
}


@pytest.fixture(scope="module")
def outputs(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    roots = {}
    for format_, features in FEATURES.items():
        root = roots[format_] = tmp_path_factory.mktemp(format_)
        extract_plainly(
            [made / "in"], root / "out", made / "ckpt", tiling="dynamic", max_tiles=4,
            features=features, format=format_, carry=("txt", "json:none"),
        )  # fmt: skip
    return roots


@pytest.fixture
def copied(outputs: dict[Format, Path], tmp_path: Path) -> Callable[[Format], Path]:
    def copy(format_: Format) -> Path:
        return Path(shutil.copytree(outputs[format_], tmp_path / "copy"))

    return copy


@pytest.mark.parametrize("format_", FEATURES)
def test_a_whole_output_passes(format_: Format, outputs: dict[Format, Path], made: Path) -> None:
    found = check(outputs[format_], inputs=(str(made / "in"),), recompute=4)
    assert found.problems == ()
    plain = check(made)
    assert (found.samples, found.tiles, found.rejects) == (plain.samples, plain.tiles, 1)
    assert found.recomputed is not None
    assert found.recomputed.startswith("4 pictures, ")


@pytest.mark.parametrize("format_", FEATURES)
def test_parts_that_are_cut_pass(format_: Format, made: Path, tmp_path: Path) -> None:
    commits = extract_plainly(
        [made / "in"], tmp_path / "out", made / "ckpt", chunk_tiles=1, target_part_bytes=1,
        features=FEATURES[format_], format=format_,
    )  # fmt: skip
    assert [len(commit.parts) for commit in commits] == [7, 5]
    assert check(tmp_path, inputs=(str(made / "in"),), recompute=2).problems == ()


@pytest.mark.parametrize("format_", FEATURES)
def test_every_object_is_missed_and_compared(
    format_: Format, copied: Callable[[Format], Path]
) -> None:
    root = copied(format_)
    names = list(files_below(root / "out/embeddings"))
    assert len(names) == (6 if format_ == "npy" else 2)
    for name in names:
        path = root / "out/embeddings" / name
        data = path.read_bytes()
        path.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
        (problem,) = check(root).problems
        assert "its bytes are not those that were committed (sha256 differs)" in problem
        assert name in problem
        path.unlink()
        (problem,) = check(root).problems
        assert problem.endswith("missing")
        assert name in problem
        path.write_bytes(data)
    assert check(root).problems == ()


def follow(root: Path, shard: str, path: str, data: bytes) -> None:
    """Changes an object, and what its commit says of it."""
    (root / "out" / path).write_bytes(data)

    def edit(commit: dict[str, Any]) -> None:
        part = commit["parts"][0]
        for published in (part, *part.get("beside", ())):
            if published["path"] == path:
                digest = hashlib.sha256(data).hexdigest()
                published |= {"bytes": len(data), "sha256": digest}

    edit_commit(root, shard, edit)


def test_an_array_with_a_value_that_is_not_finite(copied: Callable[[Format], Path]) -> None:
    root = copied("npy")
    path = "embeddings/mean/img_emb_a.npy"
    values = np.load(root / "out" / path)
    values[-1, 3] = np.inf
    sink = io.BytesIO()
    np.save(sink, values)
    follow(root, "a", path, sink.getvalue())
    assert check(root).problems == (
        "embeddings/cls/img_emb_a.npy: a value of mean is not finite: sample 7",
    )


def test_a_tar_with_a_value_that_is_not_finite(copied: Callable[[Format], Path]) -> None:
    root = copied("webdataset")
    path = root / "out/embeddings/a.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        last = [entry for entry in archive if entry.name.endswith(".tokens.npy")][-1]
    data[last.offset_data + last.size - 2 : last.offset_data + last.size] = b"\x00\x7e"  # a NaN
    follow(root, "a", "embeddings/a.tar", bytes(data))
    assert check(root).problems == ("embeddings/a.tar: a value of tokens is not finite: sample 7",)


@pytest.mark.parametrize("format_", FEATURES)
def test_what_belongs_to_no_commit_is_named(
    format_: Format, copied: Callable[[Format], Path]
) -> None:
    root = copied(format_)
    strays = {
        "webdataset": ["embeddings/z.tar", "embeddings/a/z-00000.tar"],
        "npy": ["embeddings/cls/img_emb_z.npy", "embeddings/metadata/metadata_a~2Fz.parquet"],
    }[format_]
    for stray in strays:
        (root / "out" / stray).write_bytes(b"x")
    assert set(check(root).problems) == {f"{stray}: part without commit" for stray in strays}


def test_arrays_of_another_shape_are_told(copied: Callable[[Format], Path]) -> None:
    root = copied("npy")
    path = "embeddings/cls/img_emb_a.npy"
    values = np.load(root / "out" / path)
    sink = io.BytesIO()
    np.save(sink, values.astype(np.float32))
    follow(root, "a", path, sink.getvalue())
    (problem,) = check(root).problems
    assert problem == f"{path}: the array of cls is not float16 {list(values.shape)}"


@pytest.mark.parametrize("format_", FEATURES)
def test_status_and_report_look_into_every_format(
    format_: Format, outputs: dict[Format, Path], made: Path, tmp_path: Path
) -> None:
    def sizes_of(root: Path) -> Sizes:
        output = f"{root}/out"
        parts = [part for c in read_commits(output, ["a", "a/b"], STORAGE) for part in c.parts]
        return sample_sizes(parts, output, STORAGE)

    found = sizes_of(outputs[format_])
    assert found == sizes_of(made)
    assert (found.pictures, found.failed) == (12, 0)
    status = read_status(f"{outputs[format_]}/out", {})
    assert status.output_bytes == sum(
        len(data) for data in files_below(outputs[format_] / "out/embeddings").values()
    )
    write_report(f"{outputs[format_]}/out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert ("tokens [17, 80]" if format_ == "webdataset" else "mean [80]") in page


def test_the_head_of_a_tar_is_enough(outputs: dict[Format, Path]) -> None:
    """Cut anywhere, the documents that are whole are found."""
    data = (outputs["webdataset"] / "out/embeddings/a.tar").read_bytes()
    whole = [document["sample_index"] for document in documents_at_head(data)]
    assert whole == [0, 1, 2, 3, 5, 6, 7]
    for end in range(0, len(data), 997):
        found = [document["sample_index"] for document in documents_at_head(data[:end])]
        assert found == whole[: len(found)]
    assert found == whole
