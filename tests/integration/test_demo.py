"""`tessera demo` as a stranger sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from tests.builders import cli_env, files_below, run_cli


def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    done = run_cli("demo", "shown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"3 of 3 +│ 26 +│ 50 +│ 1 ", done.stdout), done.stdout
    assert "reject: 0006-grass-cut-short.jpg: decode/truncated:" in done.stdout

    folder = tmp_path / "shown"
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width == 1660
        assert sheet.height > 3000
    files = files_below(folder / "output")
    assert sorted(name for name in files if name.startswith("embeddings/")) == [
        "embeddings/as-shipped.parquet",
        "embeddings/encodings.parquet",
        "embeddings/sizes.parquet",
    ]
    rejects = pq.read_table(folder / "output/rejects/encodings.parquet").to_pylist()
    assert [reject["key"] for reject in rejects] == ["0006-grass-cut-short"]

    shown, _, ending = done.stdout.partition("\nsearch: ")
    itself = r"finds itself first \(distance (0\.\d{4})\), then 0000-astronaut-grey \((0\.\d{4})\)"
    distances = re.search(f"astronaut, turned and recompressed, {itself}", ending)
    assert distances is not None, ending
    assert 10 * float(distances[1]) < float(distances[2])
    assert ending.splitlines()[1:] == ["look around: tessera browse shown/index"]

    program = shown[shown.index("import pyarrow.dataset") :]
    assert len(program.strip().splitlines()) == 3
    opened = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=cli_env(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert opened.returncode == 0, opened.stderr
    assert "0000-astronaut" in opened.stdout
