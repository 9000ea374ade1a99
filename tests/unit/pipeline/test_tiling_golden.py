"""The tiles of one small file of every kind, by checksum.

Needs numpy, Pillow and pytest only, so that it can run beside another Pillow version:

    python -m pytest -c /dev/null --rootdir . --noconftest tests/unit/pipeline/test_tiling_golden.py
"""

import json

import pytest

from tests.data.make_tiling_pictures import FOLDER, TILINGS, tiles_sha256

GOLDEN = json.loads((FOLDER / "golden.json").read_text())


def test_there_is_a_checksum_for_every_file() -> None:
    files = {path.name for path in FOLDER.iterdir()} - {"golden.json"}
    assert set(GOLDEN) == files
    assert len(files) == 22


@pytest.mark.parametrize("mode", TILINGS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tiles_are_those_of_every_pillow(name: str, mode: str) -> None:
    assert tiles_sha256((FOLDER / name).read_bytes(), TILINGS[mode]) == GOLDEN[name][mode]
