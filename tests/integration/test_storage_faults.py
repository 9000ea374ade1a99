"""Storage faults between the job and a real S3 server: tried again within limits, gone on at the
byte where it broke, or told; never short or damaged data taken for whole."""

from __future__ import annotations

import hashlib
import io
import random
import secrets
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from pipeline import forward_reader, retries, s3
from pipeline.forward_reader import ForwardReader
from pipeline.records import Shard, ShardEnd
from pipeline.retries import ATTEMPTS
from pipeline.s3 import ObjectChangedError
from pipeline.samples import ReadSettings, read_groups
from pipeline.stock import take_stock
from pipeline.storage import CredentialsError, Storage
from tests.builders import MTIME, samples, tar_bytes
from tests.fault_proxy import FaultProxy, Rule
from tests.s3 import S3Server

DATA = random.Random(1).randbytes(120_000)
DEADLINE_SECONDS = 10.0
SHORT_SECONDS = 0.3  # where nothing comes
BUSY_SECONDS = 2.0  # where something stalls, and then has to come on two busy cores
SLACK_SECONDS = 30.0  # less than attempts of DEADLINE_SECONDS would take
FAULTS = ["500", "503", "reset-before", "stall-before"]
BODY_FAULTS = ["reset-mid", "fin-mid", "stall-mid"]
LENGTHS = ["longer-length", "shorter-length"]


@pytest.fixture(scope="module")
def running(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy, bucket: str) -> FaultProxy:
    """What an earlier test gave up may still be on its way: it is about another bucket."""
    running.restart(bucket)
    return running


@pytest.fixture
def storage(s3: S3Server, proxy: FaultProxy) -> Storage:
    return Storage({**s3.options, "endpoint_url": proxy.endpoint}, DEADLINE_SECONDS)


def hurried(storage: Storage, fault: str, seconds: float = SHORT_SECONDS) -> Storage:
    short = fault.startswith(("stall", "slow"))
    return Storage(storage.options, seconds) if short else storage


@pytest.fixture
def bucket(s3: S3Server) -> str:
    name = f"faults-{secrets.token_hex(4)}"
    client_of(s3).create_bucket(Bucket=name)
    client_of(s3).put_object(Bucket=name, Key="k", Body=DATA)
    return name


@cache
def client_of(server: S3Server) -> Any:
    """A client takes a fifth of a second to make."""
    return server.client()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    made: list[float] = []
    # Its name for the module, not the module itself: other threads do sleep.
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=made.append))
    return made


def starts(proxy: FaultProxy, key: str) -> list[int]:
    """First bytes of the ranges that were asked for (0: no range)."""
    spans = [request.range or "bytes=0-" for request in proxy.seen("GET", key)]
    return [int(span.removeprefix("bytes=").partition("-")[0]) for span in spans]


def end_of(url: str, storage: Storage, accept_truncated: bool = False) -> ShardEnd:
    """How the reader says that a shard ended."""
    settings = ReadSettings(storage, ("jpg",), (), accept_truncated)
    end = list(read_groups(Shard(url, "s"), settings))[-1].head.end
    assert end is not None
    return end


READS: dict[str, Callable[[Storage, str], bytes]] = {
    "whole": lambda storage, url: storage.read(url),
    "range": lambda storage, url: storage.read_range(url, 1000, 101_000),
}
EXPECTED = {"whole": DATA, "range": DATA[1000:101_000]}


@pytest.mark.parametrize("kind", READS)
class TestReading:
    @pytest.mark.parametrize("fault", [*FAULTS, *BODY_FAULTS, *LENGTHS])
    def test_a_fault_that_passes(
        self,
        fault: str,
        kind: str,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        pauses: list[float],
    ) -> None:
        proxy.rules = [Rule(fault, "GET", times=2)]
        found = READS[kind](hurried(storage, fault, BUSY_SECONDS), f"s3://{bucket}/k")
        assert found == EXPECTED[kind]
        # Where all came, and the length alone was wrong, there is nothing to ask for again.
        assert proxy.counts[fault] == 2 or (fault, kind) == ("longer-length", "range")
        assert proxy.counts[fault] <= len(proxy.requests) <= ATTEMPTS
        assert 1 <= len(pauses) < ATTEMPTS

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_that_lasts_ends_within_the_limits(
        self, fault: str, kind: str, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule(fault)]
        began = time.monotonic()
        with pytest.raises(OSError, match=rf"cannot read .*/k: .*\({ATTEMPTS} attempts\)"):
            READS[kind](hurried(storage, fault), f"s3://{bucket}/k")
        assert time.monotonic() - began < ATTEMPTS * SHORT_SECONDS + SLACK_SECONDS
        # aiohttp itself asks once more where a used connection broke before an answer
        most = ATTEMPTS * (2 if fault == "reset-before" else 1)
        # At a deadline of a moment a busy machine may not even have sent a request.
        least = 1 if fault == "stall-before" else ATTEMPTS
        assert least <= len(proxy.requests) <= most

    @pytest.mark.parametrize("fault", BODY_FAULTS)
    def test_it_goes_on_at_the_byte_where_it_broke(
        self, fault: str, kind: str, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule(fault, "GET", times=2)]
        storage = hurried(storage, fault, BUSY_SECONDS)
        assert READS[kind](storage, f"s3://{bucket}/k") == EXPECTED[kind]
        first, length = (0, 120_000) if kind == "whole" else (1000, 100_000)
        came = starts(proxy, f"{bucket}/k")
        assert came[0] == first
        assert came == sorted(came)  # how far it came before it broke is a matter of time
        assert came[-1] > first
        assert 3 <= len(came) <= ATTEMPTS
        assert came[1] <= first + length // 2
        assert came[2] <= first + length // 2 + length // 4

    def test_a_slow_body_is_gone_on_with_and_one_that_is_too_slow_given_up(
        self, kind: str, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule("slow", "GET", bytes_per_second=40_000)]  # 2.5 s or 3, and 2 each
        assert READS[kind](hurried(storage, "slow", 2.0), f"s3://{bucket}/k") == EXPECTED[kind]
        came = starts(proxy, f"{bucket}/k")
        assert came == sorted(came)
        assert came[-1] > came[0]
        assert 2 <= len(came) <= ATTEMPTS
        proxy.rules = [Rule("slow", "GET", bytes_per_second=10_000)]
        began = time.monotonic()
        with pytest.raises(OSError, match=rf"not done within its deadline \({ATTEMPTS} attempts\)"):
            READS[kind](hurried(storage, "slow"), f"s3://{bucket}/k")
        assert time.monotonic() - began < ATTEMPTS * SHORT_SECONDS + SLACK_SECONDS

    def test_a_listed_object_that_is_gone_is_not_asked_for_again(
        self, kind: str, storage: Storage, bucket: str, proxy: FaultProxy, pauses: list[float]
    ) -> None:
        assert storage.list_files(f"s3://{bucket}") == {"k": len(DATA)}
        proxy.rules = [Rule("404", "GET")]
        with pytest.raises(FileNotFoundError, match=f"s3://{bucket}/k is not there"):
            READS[kind](storage, f"s3://{bucket}/k")
        assert len(proxy.seen("GET")) == 1
        assert pauses == []


class TestLookingUp:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_that_passes_and_one_that_lasts(
        self, fault: str, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule(fault, "HEAD", times=2)]
        found = hurried(storage, fault, BUSY_SECONDS).info(f"s3://{bucket}/k")
        assert found.size == len(DATA)
        proxy.rules = [Rule(fault, "HEAD")]
        with pytest.raises(OSError, match=rf"cannot look up .*\({ATTEMPTS} attempts\)"):
            hurried(storage, fault).info(f"s3://{bucket}/k")


class TestWhatCameIsChecked:
    def test_a_flipped_byte_of_a_whole_object(
        self, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule("flip-answer", "GET", times=2)]
        assert storage.read(f"s3://{bucket}/k") == DATA
        assert starts(proxy, f"{bucket}/k") == [0, 0, 0]
        proxy.rules = [Rule("flip-answer", "GET")]
        with pytest.raises(OSError, match=rf"cannot read .*DamagedObject.*\({ATTEMPTS} attempts\)"):
            storage.read(f"s3://{bucket}/k")

    def test_other_bytes_than_the_writer_says_are_asked_for_again(
        self, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        """Whatever the store says of them."""
        assert storage.read(f"s3://{bucket}/k", zlib.crc32(DATA)) == DATA
        proxy.restart(bucket)
        with pytest.raises(OSError, match=rf"its crc32 is not 00000001 \({ATTEMPTS} attempts\)"):
            storage.read(f"s3://{bucket}/k", 1)
        assert starts(proxy, f"{bucket}/k") == [0] * ATTEMPTS

    def test_a_flipped_byte_of_a_shard_fails_the_shard(
        self,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In the middle of a picture or a caption, where nothing else would tell."""
        monkeypatch.setattr(forward_reader, "BLOCK_BYTES", 20_000)
        data = tar_bytes(samples(12))
        client_of(s3).put_object(Bucket=bucket, Key="s.tar", Body=data)
        url = f"s3://{bucket}/s.tar"
        assert end_of(url, storage) == ShardEnd(12, len(data), hashlib.md5(data).hexdigest())
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [m for m in archive.getmembers() if m.name.endswith((".jpg", ".txt"))]
        for member in random.Random(0).sample(members, 6):
            block, at = divmod(member.offset_data + member.size // 2, 20_000)
            proxy.rules = [Rule("flip-answer", "GET", nth=[block + 1], at=at)]
            failure = str(end_of(url, storage).failure)
            assert failure.startswith(f"DamagedObjectError: {url}: damaged on the way: what came")
        assert proxy.counts == {"flip-answer": 6}

    def test_a_cut_that_a_flipped_byte_made_is_not_accepted(
        self, s3: S3Server, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
            entry = tarfile.TarInfo("0.jpg")
            entry.size, entry.mtime = 80_000, MTIME
            entry.pax_headers = {"size": "80000"}
            archive.addfile(entry, io.BytesIO(bytes(80_000)))
        data = sink.getvalue()
        client_of(s3).put_object(Bucket=bucket, Key="s.tar", Body=data)
        url = f"s3://{bucket}/s.tar"
        proxy.rules = [Rule("flip-answer", "GET", at=data.index(b"size=80000") + len("size="))]
        end = end_of(url, storage, accept_truncated=True)
        assert end.truncated_at is None
        assert str(end.failure).startswith("DamagedObjectError: ")
        # One that was uploaded so is cut, and accepted.
        client_of(s3).put_object(
            Bucket=bucket, Key="s.tar", Body=data.replace(b"=80000", b"=90000")
        )
        proxy.rules = []
        assert end_of(url, storage, accept_truncated=True).failure is None

    def test_a_shard_that_was_uploaded_in_parts(
        self,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Checked where the store tells the size of a part: AWS and moto do, Ceph 16 does not."""
        data = random.Random(2).randbytes(11 << 20)
        url = f"s3://{bucket}/parts"
        for sizes in ([5 << 20, 5 << 20, 1 << 20], [5 << 20, 6 << 20]):
            upload_in_parts(s3, bucket, data, sizes)
            info = storage.info(url)
            assert info.checksum is not None
            assert info.checksum.parts == len(sizes)
            proxy.rules = []
            read_all(url, storage)
            proxy.rules = [Rule("flip-answer", "GET", nth=[1])]
            if s3.checks_secrets:  # Ceph
                assert storage.digest(url, info) is None
            elif len(sizes) == 3:
                with pytest.raises(OSError, match=r"damaged on the way: what came has md5 .*-3, "):
                    read_all(url, storage)
            else:
                read_all(url, storage)  # its checksum cannot be worked out: it says nothing

    def test_an_object_that_is_replaced_is_not_read_on(
        self,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(forward_reader, "BLOCK_BYTES", 20_000)
        url = f"s3://{bucket}/k"
        with ForwardReader(url, storage, storage.info(url)) as source:
            source.read(10)
            client_of(s3).put_object(Bucket=bucket, Key="k", Body=DATA[::-1])
            with pytest.raises(ObjectChangedError, match=f"{url}: .*replaced while it was read"):
                source.read(-1)
        assert storage.read(url) == DATA[::-1]

    def test_a_closed_reader_does_not_go_on_asking_ahead(
        self,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A command would not end before all attempts of a block that nobody wants."""
        monkeypatch.setattr(forward_reader, "BLOCK_BYTES", 20_000)
        url = f"s3://{bucket}/k"
        source = ForwardReader(url, storage, storage.info(url))
        proxy.rules = [Rule("500", "GET", nth=range(2, 100))]
        source.read(1)
        source.close()
        source._pool.shutdown(wait=True)
        assert len(proxy.seen("GET")) <= 3


def read_all(url: str, storage: Storage) -> None:
    with ForwardReader(url, storage, storage.info(url)) as source:
        source.read(1)
        source.check()


def upload_in_parts(s3: S3Server, bucket: str, data: bytes, sizes: list[int]) -> None:
    client = client_of(s3)
    upload = client.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    done, parts = 0, []
    for number, size in enumerate(sizes, 1):
        part = client.upload_part(
            Bucket=bucket, Key="parts", UploadId=upload, PartNumber=number,
            Body=data[done : done + size],
        )  # fmt: skip
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
        done += size
    client.complete_multipart_upload(
        Bucket=bucket, Key="parts", UploadId=upload, MultipartUpload={"Parts": parts}
    )


def write_bytes(storage: Storage, url: str, folder: Path) -> bytes:
    storage.publish_bytes(url, DATA)
    return DATA


def write_file(storage: Storage, url: str, folder: Path) -> bytes:
    (folder / "local").write_bytes(DATA)
    storage.publish_file(url, folder / "local")
    return DATA


def write_parts(storage: Storage, url: str, folder: Path) -> bytes:
    """Three parts of at least S3's smallest size."""
    data = random.Random(3).randbytes(11 << 20)
    (folder / "local").write_bytes(data)
    storage.publish_file(url, folder / "local")
    return data


WRITES = {"bytes": write_bytes, "file": write_file, "parts": write_parts}


@pytest.mark.parametrize("kind", WRITES)
class TestWriting:
    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3, "SINGLE_PUT_BYTES", 6 << 20)
        monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)

    @pytest.fixture(autouse=True)
    def uploads_that_begin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that is given up within a moment may begin all the same, and would be left."""
        create = s3._create_upload
        monkeypatch.setattr(
            s3, "_create_upload", lambda fs, path, timeout: create(fs, path, DEADLINE_SECONDS)
        )

    @pytest.mark.parametrize("fault", ["500", "503", "reset-before", "lost-ack", "flip-upload"])
    def test_a_fault_that_passes(
        self,
        fault: str,
        kind: str,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        tmp_path: Path,
    ) -> None:
        """Each of the first two requests of each kind (begin, send, complete) meets it."""
        changes = [op for op in ("PUT", "POST") if fault != "flip-upload" or op == "PUT"]
        proxy.rules = [Rule(fault, operation, times=2) for operation in changes]
        data = WRITES[kind](storage, f"s3://{bucket}/w", tmp_path)
        assert s3.objects(bucket) == {"k": DATA, "w": data}
        assert proxy.counts[fault] >= 2
        assert len(proxy.seen("PUT")) <= {"parts": 3}.get(kind, 1) + 2

    @pytest.mark.parametrize("fault", ["503", "flip-upload", "stall-before"])
    def test_a_fault_that_lasts_ends_within_the_limits_and_leaves_nothing(
        self,
        fault: str,
        kind: str,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Else the deadline of a part of 5 MiB is five seconds longer.
        monkeypatch.setattr("pipeline.storage.SLOWEST_BYTES_PER_SECOND", 1 << 30)
        proxy.rules = [Rule(fault, "PUT")]
        with pytest.raises(OSError, match=rf"cannot write .*/w: .*\({ATTEMPTS} attempts\)"):
            WRITES[kind](hurried(storage, fault), f"s3://{bucket}/w", tmp_path)
        most = {"parts": 3}.get(kind, 1) * ATTEMPTS
        # At a deadline of a moment a busy machine may not even have sent a request.
        assert 0 < len(proxy.seen("PUT")) <= most
        if fault != "flip-upload" or kind == "parts":  # moto keeps what arrives damaged
            assert s3.objects(bucket) == {"k": DATA}
        uploads = client_of(s3).list_multipart_uploads(Bucket=bucket)
        assert uploads.get("Uploads", []) == []


class TestACompletionWhoseAnswerIsLost:
    def test_it_is_taken_for_done_if_the_object_is_what_was_sent(
        self,
        s3: S3Server,
        storage: Storage,
        bucket: str,
        proxy: FaultProxy,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("pipeline.s3.SINGLE_PUT_BYTES", 6 << 20)
        monkeypatch.setattr("pipeline.s3.PART_BYTES", 5 << 20)
        proxy.rules = [Rule("lost-ack", "POST", nth=[2])]  # after the one that begins the upload
        data = write_parts(storage, f"s3://{bucket}/w", tmp_path)
        assert proxy.counts == {"lost-ack": 1}
        assert s3.objects(bucket)["w"] == data


class TestCredentials:
    @pytest.mark.parametrize("operation", ["GET", "HEAD", "PUT"])
    def test_expired_ones_are_looked_up_again_once(
        self, operation: str, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        url = f"s3://{bucket}/k"
        do: dict[str, Callable[[], object]] = {
            "GET": lambda: storage.read(url),
            "HEAD": lambda: storage.info(url),
            "PUT": lambda: storage.publish_bytes(url, DATA),
        }
        proxy.rules = [Rule("expired", times=3 if operation == "HEAD" else 1)]
        do[operation]()
        proxy.rules = [Rule("expired")]
        before = len(proxy.requests)
        line = r"cannot .* s3://.*/k: access refused \(ExpiredToken: The provided token has expired"
        with pytest.raises(CredentialsError, match=line):
            do[operation]()
        # A HEAD is refused without words: botocore asks for the bucket's region, we for one byte.
        asked = [request.operation for request in proxy.requests[before:]]
        assert asked == (["HEAD", "HEAD", "GET"] * 2 if operation == "HEAD" else [operation] * 2)

    def test_new_ones_in_the_environment_are_found(
        self, s3: S3Server, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ceph tells a wrong secret; for moto the proxy refuses the old key."""
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # not the client of another server
        old = {**s3.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        if s3.checks_secrets:
            old["AWS_SECRET_ACCESS_KEY"] = "wrong"
        else:
            old["AWS_ACCESS_KEY_ID"] = "old-key"
            proxy.rules = [Rule("expired", times=2)]
        for name, value in old.items():
            monkeypatch.setenv(name, value)
        storage = Storage({}, DEADLINE_SECONDS)
        with pytest.raises(CredentialsError, match=r"ExpiredToken|SignatureDoesNotMatch"):
            storage.read(f"s3://{bucket}/k")
        if not s3.checks_secrets:
            proxy.rules = [Rule("expired", times=1)]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
        assert storage.read(f"s3://{bucket}/k") == DATA
        assert proxy.requests[-1].access_key == s3.key

    def test_one_object_that_is_forbidden_says_nothing_of_the_credentials(
        self, storage: Storage, bucket: str, proxy: FaultProxy, pauses: list[float]
    ) -> None:
        proxy.rules = [Rule("403", key="*/k")]
        for read in (storage.read, storage.info):
            with pytest.raises(PermissionError, match="Access Denied") as caught:
                read(f"s3://{bucket}/k")
            assert not isinstance(caught.value, CredentialsError)
        assert len(proxy.requests) == 1 + 2
        assert pauses == []

    def test_a_shard_says_it_was_the_credentials(
        self, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        proxy.rules = [Rule("expired")]
        failure = end_of(f"s3://{bucket}/k", storage).failure
        assert str(failure).startswith("CredentialsError: cannot look up s3://")


@pytest.mark.parametrize("fault", [*BODY_FAULTS, *LENGTHS], ids=lambda fault: f"list_{fault}")
def test_a_broken_listing_is_never_taken_for_whole(
    fault: str, storage: Storage, bucket: str, proxy: FaultProxy
) -> None:
    proxy.rules = [Rule(fault, "LIST", times=2)]
    listed = hurried(storage, fault, BUSY_SECONDS).list_files(f"s3://{bucket}")
    assert listed == {"k": len(DATA)}
    assert proxy.counts[fault] == 2


class TestListings:
    def test_a_key_that_a_listing_lacks_is_no_file(
        self, s3: S3Server, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        client_of(s3).put_object(Bucket=bucket, Key="new", Body=b"1")
        proxy.rules = [Rule("hide", "LIST", hidden="n*")]
        assert storage.list_files(f"s3://{bucket}") == {"k": len(DATA)}
        proxy.rules = []
        assert storage.list_files(f"s3://{bucket}") == {"k": len(DATA), "new": 1}

    def test_a_listing_of_before(
        self, s3: S3Server, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        assert storage.list_files(f"s3://{bucket}") == {"k": len(DATA)}
        client_of(s3).put_object(Bucket=bucket, Key="new", Body=b"1")
        proxy.rules = [Rule("stale-list", "LIST")]
        assert storage.list_files(f"s3://{bucket}") == {"k": len(DATA)}

    def test_the_output_of_a_commit_that_a_listing_lacks_is_no_stray(
        self, s3: S3Server, storage: Storage, bucket: str, proxy: FaultProxy
    ) -> None:
        for name in ("commits/a.json", "commits/b.json", "embeddings/a.parquet"):
            client_of(s3).put_object(Bucket=bucket, Key=f"out/{name}", Body=b"1")
        client_of(s3).put_object(Bucket=bucket, Key="out/embeddings/b.parquet", Body=b"1")
        proxy.rules = [Rule("hide", "LIST", hidden="*commits/b.json")]
        output = f"s3://{bucket}/out"
        stock = take_stock(output, ["a", "b"], storage)
        assert stock.committed == {"a", "b"}
        assert stock.strays == []
        assert proxy.counts["hide"] > 0
