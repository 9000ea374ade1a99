"""The whole job through real Ray, against transformers' model and plain Pillow."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.checkpoint import open_checkpoint
from model.reference import load_reference, reference_embeddings
from tests.builders import (
    files_below,
    picture,
    run_cli,
    sample,
    samples,
    write_checkpoint,
    write_tar,
)

SIDE = 56
PICTURES = {
    "grey.jpg": ("L", (90, 60)),
    "cmyk.jpg": ("CMYK", (130, 50)),
    "palette.png": ("P", (61, 140)),
    "rgba.png": ("RGBA", (200, 60)),
    "lossy.webp": ("RGB", (112, 112)),
    "dot.png": ("RGB", (1, 1)),
    "strip.jpg": ("RGB", (500, 23)),
}


def encoded(name: str, mode: str, size: tuple[int, int]) -> bytes:
    image = Image.open(io.BytesIO(picture(*size, seed=len(name)))).convert(mode)
    sink = io.BytesIO()
    image.save(sink, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]])
    return sink.getvalue()


def boxes_of(rows: list[dict[str, object]]) -> list[tuple[float, float, float, float]]:
    return [tuple(row["tile_box"]) for row in rows]  # type: ignore[arg-type, misc]


def reference_tiles(data: bytes, boxes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Tiles by plain Pillow: the grid is read off the boxes, resized width first, and cropped."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    grid = boxes[:-1] if len(boxes) > 1 else boxes
    cols = len({box[0] for box in grid})
    rows = len({box[1] for box in grid})
    sheet = image.resize((cols * SIDE, image.height), Image.Resampling.BICUBIC)
    sheet = sheet.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    tiles = [
        sheet.crop((x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE))
        for y in range(rows)
        for x in range(cols)
    ]
    if len(boxes) > 1:
        small = image.resize((SIDE, image.height), Image.Resampling.BICUBIC)
        tiles.append(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


@pytest.fixture(scope="module")
def extracted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("extract")
    members = []
    for name, (mode, size) in PICTURES.items():
        key, _, extension = name.partition(".")
        members += [
            (f"set/{key}.{extension.upper()}", encoded(name, mode, size)),
            (f"set/{key}.txt", f"a {key}".encode()),
            (f"set/{key}.json", json.dumps({"url": f"u/{key}", "n": 7}).encode()),
        ]
    write_tar(folder / "in" / "modes.tar", members)
    write_tar(folder / "in" / "deep" / "plain.tar", samples(20, seed=3))
    write_tar(folder / "in" / "empty.tar", [])
    write_checkpoint(folder / "model", image_size=SIDE)
    config = folder / "job.yaml"
    config.write_text("tiling: dynamic\nmax_tiles: 3\nfeatures: [cls, mean]\nlayer: -2\n")
    done = run_cli(
        "extract", folder / "in", folder / "out",
        "--config", config, "--max-tiles", "6", "--model", folder / "model", "--dtype", "float32",
        "--embedding-dtype", "float32", "--carry", "txt,json:url,json:n", "--json",
    )  # fmt: skip
    return folder, done


def test_summary_and_layout(extracted: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = extracted
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["shards"], summary["committed"]) == (3, 3)
    assert (summary["samples"], summary["rejects"]) == (len(PICTURES) + 20, {})
    assert sorted(files_below(folder / "out")) == [
        "commits/deep/plain.json",
        "commits/empty.json",
        "commits/modes.json",
        "dataset.json",
        "embeddings/deep/plain.parquet",
        "embeddings/empty.parquet",
        "embeddings/modes.parquet",
    ]
    assert pq.read_table(folder / "out/embeddings/empty.parquet").num_rows == 0
    dataset = json.loads((folder / "out/dataset.json").read_text())
    assert dataset["settings"]["max_tiles"] == 6, "the command line wins over the file"
    assert dataset["settings"]["layer"] == 1
    assert dataset["features"] == {"cls": 80, "mean": 80}


def test_embeddings_equal_transformers_on_tiles_cut_by_plain_pillow(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    rows = pq.read_table(folder / "out/embeddings/modes.parquet").to_pylist()
    checkpoint = open_checkpoint(str(folder / "model"))
    reference = load_reference(checkpoint, "float32", "cpu")
    assert [row["key"] for row in rows if row["tile_index"] == 0] == [
        f"set/{name.partition('.')[0]}" for name in PICTURES
    ]
    for index, (name, (mode, size)) in enumerate(PICTURES.items()):
        mine = [row for row in rows if row["sample_index"] == index]
        data = encoded(name, mode, size)
        tiles = reference_tiles(data, boxes_of(mine))
        expected = reference_embeddings(reference, checkpoint, tiles, ("cls", "mean"), -2)
        assert len(mine) == len(tiles) == mine[0]["tile_count"]
        for feature in ("cls", "mean"):
            got = np.array([row[feature] for row in mine], dtype=np.float32)
            error = np.linalg.norm(got - expected[feature]) / np.linalg.norm(expected[feature])
            assert error <= 1e-5, (name, feature, error)
        assert {row["image_sha256"] for row in mine} == {hashlib.sha256(data).digest()}
        assert {(row["width"], row["height"]) for row in mine} == {size}
        assert {row["txt"] for row in mine} == {f"a {name.partition('.')[0]}"}
        assert {row["json:n"] for row in mine} == {"7"}


def test_strip_and_dot_are_tiled_as_internvl_does(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    rows = pq.read_table(folder / "out/embeddings/modes.parquet").to_pylist()
    strip = [row for row in rows if row["key"] == "set/strip"]
    assert [row["is_thumbnail"] for row in strip] == [False] * 6 + [True]
    assert strip[0]["tile_box"] == pytest.approx([0, 0, 500 / 6, 23])
    assert strip[-1]["tile_box"] == [0, 0, 500, 23]
    dot = [row for row in rows if row["key"] == "set/dot"]
    assert [row["tile_box"] for row in dot] == [[0, 0, 1, 1]]


def test_pyarrow_duckdb_and_pandas_read_the_folder_as_it_is(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    embeddings = folder / "out" / "embeddings"
    table = pds.dataset(embeddings).to_table()
    query = f"select count(*), count(distinct key) from '{embeddings}/**/*.parquet'"
    [counted] = duckdb.sql(query).fetchall()
    assert counted == (table.num_rows, len(PICTURES) + 20)
    frame = table.to_pandas()
    assert np.stack(frame["cls"].to_list()).shape == (table.num_rows, 80)


def test_status_and_verify_with_transformers_agree(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    status = run_cli("status", folder / "out", "--json")
    told = json.loads(status.stdout)
    assert (told["committed"], told["samples"], told["rejects"]) == (3, len(PICTURES) + 20, 0)
    assert told["progress"] is None
    verified = run_cli(
        "verify", folder / "out", "--input", folder / "in", "--recompute", "8", "--json"
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    report = json.loads(verified.stdout)
    assert report["problems"] == []
    assert (report["samples"], report["embedded"]) == (len(PICTURES) + 20, len(PICTURES) + 20)


def test_commits_and_report_tell_who_embedded_what(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    rows = pds.dataset(folder / "out" / "embeddings").to_table()
    read = [json.loads(file.read_text()) for file in (folder / "out/commits").rglob("*.json")]
    embedders = [embedder for commit in read for embedder in commit["replicas"]]
    assert len({(e["node"], e["replica"]) for e in embedders}) == 1
    assert sum(e["tiles"] for e in embedders) == rows.num_rows
    assert sum(e["seconds"] for e in embedders) > 0
    pictures = sum(count for commit in read for count in commit["tile_counts"].values())
    assert pictures == len(PICTURES) + 20
    done = run_cli("report", folder / "out", "--out", folder / "report.html")
    assert (done.returncode, done.stdout) == (0, f"{folder / 'report.html'}\n"), done.stderr
    page = (folder / "report.html").read_text()
    assert f"{embedders[0]['node']} {embedders[0]['replica']}" in page
    assert f"<b>{rows.num_rows:,}</b>" in page


def test_bfloat16_center_crop_is_close_and_the_same_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", samples(12, seed=5))
    checkpoint = write_checkpoint(tmp_path / "model", "layer_norm", image_size=SIDE)
    outputs = []
    for name in ("one", "two"):
        done = run_cli("extract", tmp_path / "in/a.tar", tmp_path / name, "--model", checkpoint)
        assert done.returncode == 0, done.stderr
        outputs.append(files_below(tmp_path / name))
    assert outputs[0]["embeddings/a.parquet"] == outputs[1]["embeddings/a.parquet"]
    rows = pq.read_table(tmp_path / "one/embeddings/a.parquet")
    assert (
        rows.schema.field("cls").type
        == pq.read_schema(tmp_path / "two/embeddings/a.parquet").field("cls").type
    )
    assert str(rows.schema.field("cls").type) == "fixed_size_list<element: halffloat>[80]"
    assert rows["tile_count"].to_pylist() == [1] * 12
    done = run_cli("verify", tmp_path / "one", "--recompute", "8")
    assert done.returncode == 0, done.stdout


def test_another_setting_on_the_same_output_is_refused(
    extracted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = extracted
    done = run_cli("extract", folder / "in", folder / "out", "--model", folder / "model")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "tiling: dynamic there, center-crop asked" in done.stderr


def test_one_sample_archive_of_img2dataset(tmp_path: Path) -> None:
    """`000000000.jpg/.txt/.json`, a single URL: the shard's name is the file's."""
    write_tar(tmp_path / "00000.tar", sample("000000000", picture(80, 80), "a cap", url="u"))
    checkpoint = write_checkpoint(tmp_path / "model", image_size=SIDE)
    done = run_cli(
        "extract",
        tmp_path / "00000.tar",
        tmp_path / "out",
        "--model",
        checkpoint,
        "--resize",
        "fast",
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out/embeddings/00000.parquet")["key"].to_pylist() == [
        "000000000"
    ]
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert dataset["settings"]["resize"] == "fast"
