"""A reader that only goes forward, and digests what it reads where there is a checksum."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import forward_reader
from pipeline.checksums import Checksum, DamagedObjectError
from pipeline.forward_reader import ForwardReader
from pipeline.storage import FileInfo
from tests.stages import STORAGE

CONTENT = bytes(range(256)) * 3


@pytest.fixture
def info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileInfo:
    monkeypatch.setattr(forward_reader, "BLOCK_BYTES", 100)
    (tmp_path / "x").write_bytes(CONTENT)
    return STORAGE.info(str(tmp_path / "x"))


@pytest.mark.parametrize("checksum", [None, Checksum("md5", hashlib.md5(CONTENT).hexdigest())])
def test_it_goes_forward_over_blocks(
    checksum: Checksum | None, info: FileInfo, tmp_path: Path
) -> None:
    info = replace(info, checksum=checksum)
    with ForwardReader(str(tmp_path / "x"), STORAGE, info) as source:
        assert source.read(250) == CONTENT[:250]
        source.seek(555)
        assert source.read(10) == CONTENT[555:565]
        assert source.tell() == 565
        source.check()  # reads on behind the reader's back, and moves nothing
        assert source.tell() == 565


def test_it_ends_and_never_goes_back(info: FileInfo, tmp_path: Path) -> None:
    with ForwardReader(str(tmp_path / "x"), STORAGE, info) as source:
        source.seek(565)
        assert source.read(-1) == CONTENT[565:]
        assert source.read(1) == b""
        source.check()
        with pytest.raises(AssertionError):
            source.seek(0)


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "crc32"])
def test_other_bytes_than_the_checksum_says(algorithm: str, info: FileInfo, tmp_path: Path) -> None:
    """Those that were passed over count, too."""
    info = replace(info, checksum=Checksum(algorithm, "00"))
    with ForwardReader(str(tmp_path / "x"), STORAGE, info) as source:
        source.seek(700)
        source.read(1)
        with pytest.raises(DamagedObjectError, match=rf"/x: damaged on the way: .*{algorithm}"):
            source.check()
