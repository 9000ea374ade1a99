"""What of an answer of S3's can be checked, and that the digests are those of the definitions."""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checksums import Checksum, composite_etag, of_answer, start

MD5 = "d41d8cd98f00b204e9800998ecf8427e"
CRC32 = {"ChecksumCRC32": base64.b64encode(bytes.fromhex("0a0b0c0d")).decode()}
KMS = {"ServerSideEncryption": "aws:kms"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"ETag": f'"{MD5}"'}, Checksum("md5", MD5)),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, Checksum("md5", MD5)),
        ({"ETag": f'"{MD5}"', **CRC32}, Checksum("md5", MD5)),
        ({"ETag": f'"{MD5}-12"'}, Checksum("md5", f"{MD5}-12", 12)),
        ({"ETag": f'"{MD5}-1"'}, Checksum("md5", f"{MD5}-1", 1)),
        ({"ETag": f'"{MD5}-12"', **CRC32}, Checksum("crc32", "0a0b0c0d")),
        ({"ETag": f'"{MD5}"', **KMS}, None),
        ({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"}, None),
        ({"ETag": f'"{MD5}"', **KMS, **CRC32}, Checksum("crc32", "0a0b0c0d")),
        ({"ETag": f'"{MD5}"', **KMS, **CRC32, "ChecksumType": "COMPOSITE"}, None),
        ({"ETag": f'"{MD5}"', **KMS, "ChecksumCRC32": "CgsMDQ==-3"}, None),
        ({"ETag": f'"{MD5}"', **KMS, "ChecksumCRC64NVME": "AAAAAAAAAAA="}, None),
        ({"ETag": '"0x8DC"'}, None),
        ({}, None),
    ],
)
def test_what_can_be_checked(answer: dict[str, Any], expected: Checksum | None) -> None:
    assert of_answer(answer) == expected


def test_a_directory_bucket_has_etags_that_are_no_md5() -> None:
    assert of_answer({"ETag": f'"{MD5}"'}, "name--use1-az4--x-s3") is None


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 40))
def test_digests_of_pieces_are_those_of_the_whole(pieces: list[bytes], part_bytes: int) -> None:
    data = b"".join(pieces)
    parts = [data[at : at + part_bytes] for at in range(0, len(data), part_bytes)]
    expected = {
        Checksum("md5", ""): hashlib.md5(data).hexdigest(),
        Checksum("sha256", ""): hashlib.sha256(data).hexdigest(),
        Checksum("crc32", ""): f"{zlib.crc32(data):08x}",
        Checksum("md5", "", 2): composite_etag(hashlib.md5(part).digest() for part in parts),
    }
    for checksum, whole in expected.items():
        digest = start(checksum, part_bytes)
        for piece in pieces:
            digest.update(piece)
        assert digest.hexdigest() == whole


def test_a_composite_etag_is_aws_own() -> None:
    """The md5 of the parts' md5s in binary, a dash, and their number."""
    parts = [hashlib.md5(b"a").digest(), hashlib.md5(b"b").digest()]
    assert composite_etag(parts) == f"{hashlib.md5(parts[0] + parts[1]).hexdigest()}-2"
