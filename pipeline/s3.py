"""What fsspec's common calls cannot express on S3: checksums both ways, and reads that go on.

Every function here asks once and raises what came of it; trying again is `Storage`'s part.
"""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from pipeline.checksums import (
    Checksum,
    DamagedObjectError,
    composite_etag,
    md5,
    of_answer,
    start,
)

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 << 10
SINGLE_PUT_BYTES = 64 << 20  # larger files go up in parts
PART_BYTES = 32 << 20
MAX_PARTS = 10_000  # S3's limit
DELETED_AT_ONCE = 1000  # S3's limit
PARTS_AT_ONCE = 4
ABORT_SECONDS = 30.0

# Codes of S3 for credentials that are no longer, or not at all, good; AccessDenied is not among
# them: it is about one object.
REFUSED_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "TokenRefreshRequired",
        "InvalidToken",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
    }
)


class ObjectChangedError(OSError):
    """The object is no longer the one that was looked up."""


class RangeIgnoredError(OSError):
    """The store gave other bytes than were asked for."""


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def error_code(error: BaseException) -> str | None:
    """S3's code for an error that s3fs translated into one of Python's."""
    answer = getattr(error.__cause__, "response", None)
    return answer["Error"].get("Code") if isinstance(answer, dict) and "Error" in answer else None


def head(
    fs: fsspec.AbstractFileSystem, path: str, timeout: float, **conditions: Any
) -> Mapping[str, Any]:
    """The answer to a HEAD, with the store's checksums.

    A refusal comes without words, so that expired credentials look like a bad request: it is asked
    for again with a GET of one byte.
    """
    named = _named(fs, path)
    try:
        answer: Mapping[str, Any] = fs.call_s3(
            "head_object", **named, ChecksumMode="ENABLED", **conditions, timeout=timeout
        )
    except OSError as error:
        if error_code(error) in ("400", "403"):
            sync(fs.loop, _first_byte, fs, named, timeout=timeout)
        raise
    return answer


def delete(fs: fsspec.AbstractFileSystem, paths: Sequence[str], timeout: float) -> None:
    """Removes exactly these objects of one bucket, `DELETED_AT_ONCE` at most.

    fsspec's own call takes names for patterns: `a[1].parquet` would remove `a1.parquet`. What is
    not there is no error.
    """
    bucket = fs.split_path(paths[0])[0]
    keys = [{"Key": fs.split_path(path)[1]} for path in paths]
    answer = fs.call_s3(
        "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}, timeout=timeout
    )
    if errors := answer.get("Errors"):
        first = errors[0]
        kind = PermissionError if first.get("Code") == "AccessDenied" else OSError
        raise kind(f"{len(errors)} objects stay, {first.get('Key')}: {first.get('Code')}")


async def _first_byte(fs: fsspec.AbstractFileSystem, named: Mapping[str, str]) -> None:
    answer = await fs._call_s3("get_object", **named, Range="bytes=0-0")
    await answer["Body"].aclose()


@dataclass
class _Came:
    """What one request has brought so far.

    `whole`: where it asked for the whole object, its length, its version and its checksum.
    """

    pieces: list[bytes] = field(default_factory=list)
    whole: tuple[int, str | None, Checksum | None] | None = None


class Download:
    """Reading an object, or bytes [start, end) of it, in as many attempts as it takes.

    What came before a connection broke is kept, and the next attempt asks for the rest of the same
    version of the object. A whole object is compared with its checksum, where the store gives one.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        path: str,
        start: int = 0,
        end: int | None = None,
        etag: str | None = None,
    ) -> None:
        self._fs = fs
        self._named = _named(fs, path)
        self._start = start
        self._wanted_end = end
        self._wanted_etag = etag
        self._begin_again()

    def _begin_again(self) -> None:
        self._end, self._etag = self._wanted_end, self._wanted_etag
        self._checksum: Checksum | None = None
        self._came = bytearray()

    def attempt(self, timeout: float) -> bytes:
        """Asks for what is missing; gives the whole.

        Raises:
            DamagedObjectError: it is not what the store's checksum says.
            ObjectChangedError: the object is not the version that was asked for.
        """
        from botocore.exceptions import FlexibleChecksumError  # s3fs has loaded it

        came = _Came()  # of its own: a request that was given up may still add to it
        try:
            if not self._is_whole():
                sync(self._fs.loop, self._receive, self._request(), came, timeout=timeout)
        except FlexibleChecksumError as error:
            self._begin_again()
            raise DamagedObjectError(str(error)) from error
        except Exception as error:
            if error_code(error) in ("PreconditionFailed", "412"):
                self._begin_again()
                kind = ConnectionError if self._wanted_etag is None else ObjectChangedError
                raise kind("the object was replaced while it was read") from error
            if error_code(error) in ("InvalidRange", "416") and self._wanted_end is None:
                self._begin_again()  # the length that the first answer told was wrong
                raise
            self._add(came)
            raise
        self._add(came)
        if not self._is_whole():
            raise ConnectionError(f"{len(self._came)} bytes of {self._length()}")
        return self._checked()

    def _request(self) -> dict[str, Any]:
        request: dict[str, Any] = dict(self._named)
        if self._end is None:
            request["ChecksumMode"] = "ENABLED"
        else:
            request["Range"] = f"bytes={self._start + len(self._came)}-{self._end - 1}"
        if self._etag is not None:
            request["IfMatch"] = f'"{self._etag}"'
        return request

    async def _receive(self, request: Mapping[str, Any], came: _Came) -> None:
        answer = await self._fs._call_s3("get_object", **request)
        async with answer["Body"] as body:
            etag = str(answer.get("ETag", "")).strip('"') or None
            if self._wanted_etag not in (None, etag):  # where the store passes over If-Match
                raise ObjectChangedError("the object was replaced while it was read")
            asked = request.get("Range")
            if asked is None:
                checksum = of_answer(answer, self._named["Bucket"])
                came.whole = (answer["ContentLength"], etag, checksum)
            else:
                first = asked.removeprefix("bytes=").partition("-")[0]
                if not str(answer.get("ContentRange", "")).startswith(f"bytes {first}-"):
                    raise RangeIgnoredError(f"asked for bytes from {first}, the answer is another")
            while piece := await body.read(PIECE_BYTES):
                came.pieces.append(piece)

    def _add(self, came: _Came) -> None:
        pieces = b"".join(came.pieces)  # before `whole`, which is there before them
        if came.whole is not None:
            self._end, self._etag, self._checksum = came.whole
        self._came += pieces

    def _length(self) -> int | None:
        return None if self._end is None else self._end - self._start

    def _is_whole(self) -> bool:
        return len(self._came) == self._length()

    def _checked(self) -> bytes:
        """The whole; a further attempt, for whom it will not do, asks for all of it again."""
        data, checksum = bytes(self._came), self._checksum
        self._begin_again()
        if checksum is not None and checksum.parts is None:
            digest = start(checksum)
            digest.update(data)
            if (found := digest.hexdigest()) != checksum.expected:
                raise DamagedObjectError(
                    f"what came has {checksum.algorithm} {found}, the store has {checksum.expected}"
                )
        return data


def put(fs: fsspec.AbstractFileSystem, path: str, data: bytes, timeout: float) -> None:
    """One PUT, whose bytes the store checks on arrival (Content-MD5); so does its answer's ETag."""
    digest = md5(data)
    answer = fs.call_s3(
        "put_object", **_named(fs, path), Body=data, ContentMD5=_base64(digest), timeout=timeout
    )
    _check_arrived(answer, digest.hexdigest(), fs, path)


def put_file(
    fs: fsspec.AbstractFileSystem, path: str, local: Path, call: Callable[..., Any]
) -> None:
    """Puts a local file, in parts if it is large.

    `call(function, *args, num_bytes=n)` calls `function(*args, timeout=…)`, and again where the
    fault can pass: a part that was lost goes up again alone.
    """
    size = local.stat().st_size
    if size <= SINGLE_PUT_BYTES:
        call(put, fs, path, local.read_bytes(), num_bytes=size)
        return
    part_bytes = max(PART_BYTES, math.ceil(size / MAX_PARTS))
    upload = call(_create_upload, fs, path)

    def put_part(number: int) -> bytes:
        with local.open("rb") as source:
            source.seek((number - 1) * part_bytes)
            data = source.read(part_bytes)
        digest: bytes = call(_upload_part, fs, path, upload, number, data, num_bytes=len(data))
        return digest

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            digests = list(pool.map(put_part, range(1, math.ceil(size / part_bytes) + 1)))
        call(_complete_upload, fs, path, upload, digests)
    except BaseException:
        _abort_upload(fs, path, upload)
        raise


def _create_upload(fs: fsspec.AbstractFileSystem, path: str, timeout: float) -> str:
    answer = fs.call_s3("create_multipart_upload", **_named(fs, path), timeout=timeout)
    return str(answer["UploadId"])


def _upload_part(
    fs: fsspec.AbstractFileSystem,
    path: str,
    upload: str,
    number: int,
    data: bytes,
    timeout: float,
) -> bytes:
    """Gives the part's md5."""
    digest = md5(data)
    answer = fs.call_s3(
        "upload_part", **_named(fs, path), UploadId=upload, PartNumber=number, Body=data,
        ContentMD5=_base64(digest), timeout=timeout,
    )  # fmt: skip
    _check_arrived(answer, digest.hexdigest(), fs, path)
    return digest.digest()


def _complete_upload(
    fs: fsspec.AbstractFileSystem,
    path: str,
    upload: str,
    digests: Sequence[bytes],
    timeout: float,
) -> None:
    expected = composite_etag(digests)
    parts = [{"PartNumber": n, "ETag": f'"{d.hex()}"'} for n, d in enumerate(digests, 1)]
    try:
        answer = fs.call_s3(
            "complete_multipart_upload", **_named(fs, path), UploadId=upload,
            MultipartUpload={"Parts": parts}, timeout=timeout,
        )  # fmt: skip
    except FileNotFoundError:
        # An earlier attempt may have been carried out, and its answer lost.
        answer = head(fs, path, timeout)
        if str(answer.get("ETag", "")).strip('"') != expected:
            raise
    _check_arrived(answer, expected, fs, path)


def _abort_upload(fs: fsspec.AbstractFileSystem, path: str, upload: str) -> None:
    try:
        fs.call_s3(
            "abort_multipart_upload", **_named(fs, path), UploadId=upload, timeout=ABORT_SECONDS
        )
    except Exception as error:  # noqa: BLE001 the first error is the one to tell
        logger.warning("%s: the parts of an upload that failed are left: %s", path, error)


def _check_arrived(
    answer: Mapping[str, Any], expected: str, fs: fsspec.AbstractFileSystem, path: str
) -> None:
    checksum = of_answer(answer, _named(fs, path)["Bucket"])
    if checksum is None or checksum.algorithm != "md5" or checksum.expected == expected:
        return
    raise DamagedObjectError(f"what arrived has md5 {checksum.expected}, what was sent {expected}")


def part_bytes(
    fs: fsspec.AbstractFileSystem, path: str, size: int, parts: int, timeout: float
) -> int | None:
    """Size of an object's first part, if the store tells it, and it fits with that many parts."""
    if parts == 1:
        return size
    first = int(head(fs, path, timeout, PartNumber=1)["ContentLength"])
    return first if first < size and math.ceil(size / first) == parts else None


def parts_are_even(
    fs: fsspec.AbstractFileSystem, path: str, size: int, first: int, parts: int, timeout: float
) -> bool:
    """Whether all parts but the last are as large as the first: one HEAD for each."""
    sizes = [
        int(head(fs, path, timeout, PartNumber=number)["ContentLength"])
        for number in range(2, parts + 1)
    ]
    return all(found == first for found in sizes[:-1]) and first + sum(sizes) == size


def _named(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, str]:
    """How S3's calls name an object."""
    bucket, key, version = fs.split_path(path)
    if not key:
        raise FileNotFoundError(f"{path} is a bucket")
    return {"Bucket": bucket, "Key": key, **({"VersionId": version} if version else {})}


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()
