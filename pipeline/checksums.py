"""What a store says the bytes of an object digest to, and the same of the bytes that came."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MD5_ETAG = re.compile(r"[0-9a-f]{32}")
COMPOSITE_ETAG = re.compile(r"[0-9a-f]{32}-([0-9]+)")
# Those of S3's checksums that Python computes; CRC32C and CRC64NVME need a package of their own.
FULL_OBJECT = {"ChecksumSHA256": "sha256", "ChecksumSHA1": "sha1", "ChecksumCRC32": "crc32"}


class DamagedObjectError(OSError):
    """Bytes came, or arrived, other than the checksum that goes with them says."""


@dataclass(frozen=True)
class Checksum:
    """What an object's bytes digest to, as the store writes it.

    parts: number of parts of an upload whose md5s are digested in place of the bytes.
    """

    algorithm: str
    expected: str
    parts: int | None = None


class Hash(Protocol):
    """What hashlib's objects do, as far as it is needed."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc32:
    """zlib's crc32 as hashlib would have it."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class CompositeMd5:
    """The ETag of an object that was uploaded in parts of `part_bytes`: an md5 of their md5s."""

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes
        self._digests: list[bytes] = []
        self._part, self._room = md5(), part_bytes

    def update(self, data: bytes, /) -> None:
        rest = memoryview(data)
        while len(rest) >= self._room:
            self._part.update(rest[: self._room])
            rest = rest[self._room :]
            self._digests.append(self._part.digest())
            self._part, self._room = md5(), self.part_bytes
        self._part.update(rest)
        self._room -= len(rest)

    def hexdigest(self) -> str:
        begun = [self._part.digest()] if self._room < self.part_bytes else []
        return composite_etag([*self._digests, *begun])


def md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)


def composite_etag(digests: Iterable[bytes]) -> str:
    """How S3 (AWS, Ceph, moto…) names an object of parts with these md5s."""
    parts = list(digests)
    return f"{md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def start(checksum: Checksum, part_bytes: int = 0) -> Hash:
    """An empty digest of the checksum's kind; `part_bytes`: of all parts but the last."""
    if checksum.parts is not None:
        return CompositeMd5(part_bytes)
    if checksum.algorithm == "crc32":
        return Crc32()
    return md5() if checksum.algorithm == "md5" else hashlib.new(checksum.algorithm)


def of_answer(answer: Mapping[str, Any], bucket: str = "") -> Checksum | None:
    """The checksum in S3's answer to a HEAD, GET or PUT; None where nothing can be checked.

    An ETag is an md5 unless the object is encrypted with keys of a KMS or of the customer, or lies
    in a directory bucket (AWS's documentation of `Object`, field `ETag`).
    """
    etag = str(answer.get("ETag", "")).strip('"')
    plain = answer.get("ServerSideEncryption") in (None, "AES256")
    if plain and not answer.get("SSECustomerAlgorithm") and not bucket.endswith("--x-s3"):
        if MD5_ETAG.fullmatch(etag):
            return Checksum("md5", etag)
        full_object = _full_object(answer)
        composite = COMPOSITE_ETAG.fullmatch(etag)
        if full_object is None and composite:
            return Checksum("md5", etag, int(composite[1]))
        return full_object
    return _full_object(answer)


def _full_object(answer: Mapping[str, Any]) -> Checksum | None:
    for name, algorithm in FULL_OBJECT.items():
        value = answer.get(name)
        if value and "-" not in value and answer.get("ChecksumType") != "COMPOSITE":
            return Checksum(algorithm, base64.b64decode(value).hex())
    return None
