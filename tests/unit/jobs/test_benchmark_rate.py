"""A device's rate out of a result file of the encoder's benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmark_rate import read_benchmark
from jobs.device_tables import load_devices
from model.errors import UserError

TABLE = load_devices(None)
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def result(**changes: Any) -> dict[str, Any]:
    """As benchmarks/record.py writes it, of an H200 that was never there."""
    document = {
        "what": "encoder",
        "date": "2026-12-01",
        "gpu": {"name": "NVIDIA H200", "count": 1},
        "tables": [
            {
                "title": "The network: normalised pixels on the device to tokens",
                "columns": ["", "batch", "ms", "min-max", "tiles/s"],
                "rows": [
                    ["ours, bfloat16", 8, 150.0, "", 53.3],
                    ["ours, bfloat16", 32, 560.0, "", 57.1],
                    ["ours, fp8", 32, "out of memory", None],
                ],
            },
            {
                "title": "`encode` of 128 uint8 tiles in host memory, best batch",
                "columns": ["", "tiles/s", "seconds"],
                "rows": [["ours, bfloat16", 56.2, 2.28], ["ours, fp8", 81.0, 1.5]],
            },
        ],
        "notes": ["a note", "45 blocks, hidden 3200: 11.94 TFLOP a tile in linear layers"],
    }
    return {**document, **changes}


def written(folder: Path, document: object) -> Path:
    file = folder / "result.json"
    file.write_text(json.dumps(document))
    return file


def test_the_public_encode_counts(tmp_path: Path) -> None:
    file = written(tmp_path, result())
    device, measured = read_benchmark(file, TABLE, "bfloat16")
    assert (device.name, measured.tiles_per_second) == ("H200", 56.2)
    assert measured.tflop_per_tile == 11.94
    assert "result.json, 2026-12-01, NVIDIA H200" in measured.source
    assert read_benchmark(file, TABLE, "fp8")[1].tiles_per_second == 81.0


def test_without_it_the_network_at_its_best_batch(tmp_path: Path) -> None:
    document = result(tables=result()["tables"][:1])
    file = written(tmp_path, document)
    assert read_benchmark(file, TABLE, "bfloat16")[1].tiles_per_second == 57.1
    with pytest.raises(UserError, match=r"no tiles/s of 'ours, fp8'"):
        read_benchmark(file, TABLE, "fp8")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (result(what="stages"), "a result of 'stages'; expected one of encoder"),
        (result(gpu=None), "measured on a CPU"),
        (result(gpu={"name": "Tesla T4"}), "no Tesla T4; add it to a copy"),
        (result(notes=["nothing"]), "no work of a tile"),
        ({"what": "encoder"}, "no result of a benchmark: date: Field required"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, document: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_benchmark(written(tmp_path, document), TABLE, "bfloat16")


def test_a_rate_of_bfloat16_is_none_of_float32(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype float32: the table of devices has no peak for it"):
        read_benchmark(written(tmp_path, result()), TABLE, "float32")


def test_the_results_of_this_repository_are_such_files() -> None:
    files = sorted(RESULTS.glob("*-encoder-*.json"))
    assert files
    for file in files:
        if file.stem.endswith("-cpu"):
            with pytest.raises(UserError, match="measured on a CPU"):
                read_benchmark(file, TABLE, "bfloat16")
        else:
            assert read_benchmark(file, TABLE, "bfloat16")[1].tiles_per_second > 0
