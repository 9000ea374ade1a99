"""One run at a time: who gets the lease, who is refused, and what a paused holder finds."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import UserError
from pipeline import lease as lease_module
from pipeline.lease import (
    Holder,
    Lease,
    LeaseLostError,
    acquire,
    held,
    lease_url,
    refuse_if_lost,
)
from pipeline.storage import Storage
from tests.builders import REPOSITORY
from tests.s3 import S3_SERVERS, S3Server

ELSEWHERE = "0000-boot pid:[1] 7 123"


@pytest.fixture(params=["local", *S3_SERVERS])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: Callable[[str], S3Server]
) -> tuple[Storage, str]:
    if request.param == "local":
        return Storage(), str(tmp_path / "out")
    server = s3_server(request.param)
    return Storage(server.options), server.make_bucket(f"lease-{secrets.token_hex(4)}") + "/out"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Makes `acquire`'s waits pass at once; what is given happens in each of them."""
    moment = 1000.0
    meanwhile: list[Callable[[], None]] = []

    def sleep(seconds: float) -> None:
        nonlocal moment
        moment += seconds
        for act in meanwhile:
            act()

    stepped = SimpleNamespace(sleep=sleep, monotonic=lambda: moment)
    monkeypatch.setattr(lease_module, "time", stepped)
    return meanwhile.append


@pytest.fixture
def release() -> Iterator[Callable[[Lease], Lease]]:
    """Keeps leases to be released after the test."""
    kept: list[Lease] = []

    def keep(lease: Lease) -> Lease:
        kept.append(lease)
        return lease

    yield keep
    for lease in kept:
        lease.release()


def holder(run: str = "other", process: str = ELSEWHERE, renewals: int = 0) -> Holder:
    return Holder(
        run=run, host="far", pid=7, process=process, taken_at="2026-11-24T00:00:00+00:00",
        renewals=renewals,
    )  # fmt: skip


def put(place: tuple[Storage, str], number: int, who: Holder) -> None:
    storage, output = place
    storage.publish_bytes(lease_url(output, number), who.dump())


def leases(place: tuple[Storage, str]) -> list[str]:
    names = place[0].iter_files(f"{place[1]}/_runs", depth=1)
    return sorted(name for name in names if not name.startswith("held-"))


def test_a_lease_is_there_while_it_is_held_and_gone_after(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    with held(output, "mine", storage):
        assert leases(place) == ["lease-000000001.json"]
        there = Holder.parse(storage.read(lease_url(output, 1)), "")
        assert (there.run, there.pid, there.renewals) == ("mine", os.getpid(), 0)
    assert storage.list_files(output) == {}
    assert not Path(output, "_runs").exists()  # where it is a local one


def test_one_of_many_that_start_at_once_gets_it(place: tuple[Storage, str]) -> None:
    storage, output = place
    together = threading.Barrier(8)
    got: list[Lease] = []
    refused: list[str] = []

    def start(number: int) -> None:
        together.wait()
        try:
            got.append(acquire(output, f"run-{number}", storage))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 7
    assert all(f"process {os.getpid()} on" in line for line in refused)
    assert leases(place) == ["lease-000000001.json"]
    got[0].release()


@pytest.mark.parametrize("trouble", [OSError("reset"), UserError("half a profile of AWS")])
def test_a_renewal_that_fails_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    fails, renewed = iter([True, True, False]), threading.Event()

    class Flaky(Storage):
        held = False

        def publish_bytes(self, url: str, data: bytes, *how: Any, **named: Any) -> None:
            if self.held and next(fails, False):
                raise trouble
            super().publish_bytes(url, data, *how, **named)
            if self.held:
                renewed.set()

    storage = Flaky()
    lease = acquire(str(tmp_path / "out"), "mine", storage)
    storage.held = True
    assert renewed.wait(60)
    lease.check()
    lease.release()


def test_a_holder_that_renews_is_alive(
    place: tuple[Storage, str], clock: Callable[[Callable[[], None]], None]
) -> None:
    storage, output = place
    renewals = iter(range(100))
    put(place, 1, holder())
    clock(lambda: put(place, 1, holder(renewals=next(renewals))))
    with pytest.raises(UserError, match=r"another run is at work there \(process 7 on far, since"):
        acquire(output, "mine", storage)
    assert leases(place) == ["lease-000000001.json"]


def test_a_holder_without_a_sign_of_life_is_succeeded(
    place: tuple[Storage, str],
    clock: Callable[[Callable[[], None]], None],
    release: Callable[[Lease], Lease],
) -> None:
    storage, output = place
    put(place, 4, holder())
    waits: list[None] = []
    clock(lambda: waits.append(None))
    lease = release(acquire(output, "mine", storage))
    assert len(waits) == 30  # seconds, one at a time
    assert leases(place) == ["lease-000000004.json", "lease-000000005.json"]
    lease.release()
    assert leases(place) == []


def test_a_lease_that_was_never_written_out_expires_too(
    place: tuple[Storage, str],
    clock: Callable[[Callable[[], None]], None],
    release: Callable[[Lease], Lease],
) -> None:
    storage, output = place
    storage.publish_bytes(lease_url(output, 1), b"")
    release(acquire(output, "mine", storage))
    assert leases(place)[-1] == "lease-000000002.json"


def test_a_process_that_died_on_this_machine_is_not_waited_for(
    place: tuple[Storage, str],
    clock: Callable[[Callable[[], None]], None],
    release: Callable[[Lease], Lease],
) -> None:
    storage, output = place
    waits: list[None] = []
    clock(lambda: waits.append(None))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    put(place, 1, holder(process=lease_module._process(child.pid)).model_copy(
        update={"pid": child.pid}
    ))  # fmt: skip
    with pytest.raises(UserError, match=f"process {child.pid} on far"):
        acquire(output, "mine", storage)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    release(acquire(output, "mine", storage))  # a zombie is dead
    child.communicate()
    assert waits == []


def test_a_number_that_another_process_got_later_is_not_the_holder(
    place: tuple[Storage, str],
    clock: Callable[[Callable[[], None]], None],
    release: Callable[[Lease], Lease],
) -> None:
    boot, namespace, pid, _ = lease_module._process(os.getpid()).split()
    put(place, 1, holder(process=f"{boot} {namespace} {pid} 1").model_copy(
        update={"pid": os.getpid()}
    ))  # fmt: skip
    release(acquire(place[1], "mine", place[0]))
    assert leases(place)[-1] == "lease-000000002.json"


def test_a_paused_holder_finds_its_successor(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    lease = acquire(output, "mine", storage)
    put(place, 2, holder())
    lease.assure()  # renewed a moment ago: nobody could have taken it
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(LeaseLostError, match="taken over by process 7 on far"):
        lease.assure()
    assert lease.is_lost
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()
    assert leases(place) == ["lease-000000001.json", "lease-000000002.json"]


def test_a_paused_holder_finds_that_its_successor_has_ended(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)
    lease = acquire(output, "mine", storage)
    storage.remove(lease_url(output, 1))
    with pytest.raises(LeaseLostError, match="lease is gone"):
        lease.assure()
    put(place, 1, holder())  # numbered anew by a third
    lease.release()
    assert leases(place) == ["lease-000000001.json"]


def test_a_task_of_a_paused_holder_knows_a_third_run_from_its_own(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has ended, so the third has the first one's number again."""
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    monkeypatch.setattr(lease_module, "_is_here", lambda holder: False)
    first = acquire(output, "first", storage)
    refuse_if_lost(output, first.number, first.run, storage)
    acquire(output, "second", storage, patience_seconds=0.0).release()
    third = acquire(output, "third", storage)
    assert third.number == first.number
    with pytest.raises(LeaseLostError, match="lease is gone"):
        refuse_if_lost(output, first.number, first.run, storage)
    refuse_if_lost(output, third.number, third.run, storage)
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(LeaseLostError, match="lease is gone"):
        first.assure()
    first.release()
    third.release()
    assert storage.list_files(output) == {}


def test_a_renewal_that_comes_after_its_successor_has_ended_is_no_renewal(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write hangs for so long that another run takes OUTPUT over, and ends."""
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    lease = acquire(output, "mine", storage)
    publish = Storage.publish_bytes

    def late(self: Storage, url: str, data: bytes) -> None:
        monkeypatch.setattr(Storage, "publish_bytes", publish)
        put(place, 2, holder("next", process=""))  # as a successor does
        lease_module._mark_as_held(output, "next", storage)
        storage.remove(lease_url(output, 1), lease_url(output, 2), f"{output}/_runs/held-next")
        publish(self, url, data)

    monkeypatch.setattr(Storage, "publish_bytes", late)
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(LeaseLostError, match="came and ended while"):
        lease.assure()
    lease.release()


def test_a_slow_renewal_without_a_successor_goes_on(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 3600.0)
    lease = acquire(output, "mine", storage)
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.0)
    lease.assure()
    assert not lease.is_lost
    lease.release()
    assert storage.list_files(output) == {}


def test_a_holder_that_was_seen_before_its_lease_was_written_is_alive(
    place: tuple[Storage, str], clock: Callable[[Callable[[], None]], None]
) -> None:
    """The first look falls between the creation of the object and its content."""
    storage, output = place
    storage.publish_bytes(lease_url(output, 1), b"")
    renewals = iter(range(100))
    clock(lambda: put(place, 1, holder(renewals=next(renewals))))
    with pytest.raises(UserError, match="another run is at work there"):
        acquire(output, "mine", storage)
    assert leases(place) == ["lease-000000001.json"]


def test_renewals_are_written(place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, output = place
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    lease = acquire(output, "mine", storage)
    seen: set[int] = set()
    while len(seen) < 3:
        seen.add(Holder.parse(storage.read(lease_url(output, 1)), "").renewals)
    lease.release()
    assert leases(place) == []


def test_a_lost_answer_is_no_loss(
    place: tuple[Storage, str],
    monkeypatch: pytest.MonkeyPatch,
    release: Callable[[Lease], Lease],
) -> None:
    """The object was created, the answer lost, and the second attempt finds it there."""
    storage, output = place
    create = Storage.create

    def twice(self: Storage, url: str, data: bytes) -> None:
        create(self, url, data)
        create(self, url, data)

    monkeypatch.setattr(Storage, "create", twice)
    release(acquire(output, "mine", storage))
    assert leases(place) == ["lease-000000001.json"]


def test_where_the_store_decides_nothing_the_last_writer_has_it(
    tmp_path: Path,
    clock: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    release: Callable[[Lease], Lease],
) -> None:
    """A store that takes the condition and ignores it, as some S3 servers do."""
    monkeypatch.setattr(Storage, "create", Storage.publish_bytes)
    place = (Storage(), str(tmp_path))
    release(acquire(place[1], "mine", place[0])).release()
    assert "has no create-only write" in caplog.text
    acts = iter([lambda: put(place, 1, holder(run="faster"))])
    clock(lambda: next(acts, lambda: None)())
    release(acquire(place[1], "late", place[0]))  # it lost to `faster`, which then died
    assert leases(place) == ["lease-000000001.json", "lease-000000002.json"]


PAUSED = """
import sys
from pipeline import lease
from pipeline.storage import Storage
lease.RENEW_SECONDS = 0.05
with lease.held(sys.argv[1], "paused", Storage()) as mine:
    print("held", flush=True)
    input()
    lease.PATIENCE_SECONDS = 0.0
    mine.assure()
"""


def test_a_stopped_process_that_goes_on_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP, as a frozen machine; only a process of another machine is ever succeeded."""
    storage, output = Storage(), str(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, output],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        acquire(output, "mine", storage)
    monkeypatch.setattr(lease_module, "_is_here", lambda holder: False)
    with monkeypatch.context() as quick:
        quick.setattr(lease_module, "LOOK_SECONDS", 0.05)
        lease = acquire(output, "mine", storage, patience_seconds=0.5)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate("\n")
    assert process.returncode == 1
    assert "LeaseLostError" in stderr
    assert "taken over by process" in stderr
    lease.check()
    lease.release()
    assert storage.list_files(output) == {}
