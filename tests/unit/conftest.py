"""A small OUTPUT that tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.builders import samples, write_checkpoint, write_tar
from tests.outputs import BAD_PICTURE, MEMBERS, extract_plainly


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/a.tar (8 samples, one cannot be decoded), in/a/b.tar (5 samples), ckpt/ and out/."""
    root = tmp_path_factory.mktemp("made")
    members = samples(8, seed=1)
    name, image = members[BAD_PICTURE * MEMBERS]
    members[BAD_PICTURE * MEMBERS] = (name, image[: len(image) // 2])
    write_tar(root / "in/a.tar", members)
    write_tar(root / "in/a/b.tar", samples(5, seed=2))
    write_checkpoint(root / "ckpt")
    extract_plainly(
        [root / "in"],
        root / "out",
        root / "ckpt",
        tiling="dynamic",
        max_tiles=4,
        features=("cls", "mean"),
        carry=("txt", "json:url", "json:none"),
    )
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed, as if it had been made there."""
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)  # keeps the times of files
    for commit in (folder / "out/commits").rglob("*.json"):
        commit.write_text(commit.read_text().replace(str(made), str(folder)))
    return folder
