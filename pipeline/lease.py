"""One run at a time on an OUTPUT: a lease that lives in `_runs/` and expires with its holder.

Leases are numbered objects, `lease-000000001.json`; the highest is the one that counts. A run takes
OUTPUT by creating the next number, which one of several can (a create-only write), and renews its
own object every few seconds. Whoever finds a lease watches it: one that changes has a living holder
and refuses; one that stays as it is for `PATIENCE_SECONDS` is dead, and is succeeded by the next
number. No two clocks are compared, and a process that is dead on this very machine is not waited
for. A holder that was paused and finds a successor stops: see `Lease.assure`. It also finds one
that has come and ended meanwhile: each removes its predecessor's mark (`held-<run>`).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from model.errors import UserError
from pipeline.commits import RUNS, Record
from pipeline.storage import TEMPORARY, Storage, explained, join, redact

logger = logging.getLogger(__name__)

RENEW_SECONDS = 5.0
PATIENCE_SECONDS = 30.0  # six renewals
LOOK_SECONDS = 1.0
LEASE = re.compile(r"lease-(\d{9})\.json")
MARK = "held-"
SETTLE_SECONDS = 3.0  # longest time between two writes of a race, where no store decides it


class LeaseLostError(Exception):
    """Another run has taken OUTPUT over; this one must not commit any more."""


class Holder(Record):
    """Who holds OUTPUT. `process` names one process of one start of one machine ("" where the
    system cannot tell); `renewals` grows while it lives."""

    run: str
    host: str
    pid: int
    process: str
    taken_at: str
    renewals: int


@dataclass(frozen=True)
class Found:
    """A lease as it was read; `holder` is None where its content is not (yet) whole."""

    number: int
    data: bytes
    holder: Holder | None


class Lease:
    """OUTPUT is ours until `release`, or until another run takes it over."""

    def __init__(self, output: str, number: int, holder: Holder, storage: Storage) -> None:
        self._output = output
        self._number = number
        self._holder = holder
        self._storage = storage
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another run is known to have taken OUTPUT over."""
        return self._lost is not None

    @property
    def number(self) -> int:
        """Of the leases of OUTPUT; see `refuse_if_lost`."""
        return self._number

    @property
    def run(self) -> str:
        """Who holds it."""
        return self._holder.run

    def check(self) -> None:
        """Raises LeaseLostError where the loss is known already. Asks no storage."""
        if self._lost is not None:
            raise LeaseLostError(f"{redact(self._output)}: {self._lost}")

    def assure(self) -> None:
        """Makes sure that OUTPUT is still ours; after a pause, by asking the storage.

        Raises:
            LeaseLostError: it is not.
            OSError: the storage does not say.
        """
        self.check()
        if time.monotonic() - self._renewed > PATIENCE_SECONDS / 2:
            self._renew()
            self.check()

    def release(self) -> None:
        """Ends the lease, and those of dead runs before it."""
        self._ended.set()
        self._thread.join()
        if self._lost is not None:
            return
        try:
            runs = join(self._output, RUNS)
            names = [
                name for name in self._storage.iter_files(runs, depth=1) if self._is_over(name)
            ]
            mark = mark_url(self._output, self._holder.run)
            self._storage.remove(*(join(runs, name) for name in names), mark)
            self._storage.remove_empty(runs)
        except OSError as error:
            logger.warning(
                "%s: the lease is left behind (%s); the next run waits %.0f s for it to expire",
                redact(self._output), error, PATIENCE_SECONDS,
            )  # fmt: skip

    def _is_over(self, name: str) -> bool:
        """This lease, one that it succeeded, or what a killed renewal left beside one."""
        found = LEASE.fullmatch(TEMPORARY.sub("", name))
        return found is not None and int(found[1]) <= self._number

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and self._lost is None:
            try:
                self._renew()
            except (OSError, UserError) as error:
                # `assure` asks again before anything is committed.
                logger.warning("the lease on %s is not renewed: %s", redact(self._output), error)

    def _renew(self) -> None:
        with self._lock:
            began = time.monotonic()
            if successor := _read(self._output, self._number + 1, self._storage):
                self._lost = f"taken over by {_who(successor.holder)}"
                return
            mine = _read(self._output, self._number, self._storage)
            if mine is None or mine.holder is None or mine.holder.run != self._holder.run:
                self._lost = "this run's lease is gone; another run came and ended meanwhile"
                return
            renewals = self._holder.renewals + 1
            self._holder = self._holder.model_copy(update={"renewals": renewals})
            url = lease_url(self._output, self._number)
            self._storage.publish_bytes(url, self._holder.dump())
            slow = time.monotonic() - began > PATIENCE_SECONDS
            # Too late, it may have made anew a lease that a successor had ended.
            if slow and not self._is_marked():
                self._lost = "another run came and ended while the lease was being renewed"
                return
            self._renewed = began

    def _is_marked(self) -> bool:
        return self._storage.exists(mark_url(self._output, self._holder.run))


@contextmanager
def held(output: str, run: str, storage: Storage) -> Iterator[Lease]:
    """OUTPUT, for this run alone.

    Raises:
        UserError: another run is at work there, or the storage refuses.
    """
    with explained("write to", output):
        lease = acquire(output, run, storage)
    try:
        yield lease
    finally:
        lease.release()


def acquire(
    output: str, run: str, storage: Storage, patience_seconds: float = PATIENCE_SECONDS
) -> Lease:
    """Takes OUTPUT. Waits at most `patience_seconds` for a sign of life of a holder that may be
    dead.

    Raises:
        UserError: another run is at work there.
        OSError: the storage failed.
    """
    watched: Found | None = None
    since = 0.0
    while True:
        found = _newest(output, storage)
        if found is not None and not _is_dead(found.holder):
            if (
                watched is None
                or watched.number != found.number
                or (watched.holder is None and found.holder is not None)  # written out only now
            ):
                _refuse_if_alive_here(output, found.holder)
                watched, since = found, time.monotonic()
                logger.warning(
                    "%s is held by %s; looking for up to %.0f s whether it is alive",
                    redact(output), _who(found.holder), patience_seconds,
                )  # fmt: skip
            if watched.data != found.data and watched.holder is not None:
                _refuse(output, found.holder)
            if time.monotonic() - since < patience_seconds:
                time.sleep(LOOK_SECONDS)
                continue
            logger.warning("%s: its holder is dead; taking over", redact(output))
        number = 1 if found is None else found.number + 1
        holder = Holder(
            run=run,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            renewals=0,
        )
        if _take(output, number, holder, storage):
            _mark_as_held(output, run, storage)
            return Lease(output, number, holder, storage)
        watched = None  # somebody else was faster: that one is looked at now


def refuse_if_lost(output: str, number: int, run: str, storage: Storage) -> None:
    """For the tasks of a run, which have its number and name alone: to be called right before a
    commit. The number alone is not enough: a third run has it again, after the second has ended.

    Raises:
        LeaseLostError: another run has taken OUTPUT over, or has come and ended.
    """
    if storage.exists(lease_url(output, number + 1)):
        raise LeaseLostError(f"{redact(output)}: another run has taken it over")
    if not storage.exists(mark_url(output, run)):
        raise LeaseLostError(f"{redact(output)}: this run's lease is gone")


def lease_url(output: str, number: int) -> str:
    return join(output, RUNS, f"lease-{number:09d}.json")


def mark_url(output: str, run: str) -> str:
    return join(output, RUNS, f"{MARK}{run}")


def _mark_as_held(output: str, run: str, storage: Storage) -> None:
    """Sets this run's mark, and removes those of the runs that it succeeds."""
    runs = join(output, RUNS)
    marks = [name for name in storage.iter_files(runs, depth=1) if name.startswith(MARK)]
    storage.remove(*(join(runs, name) for name in marks))
    storage.publish_bytes(mark_url(output, run), b"")


def _take(output: str, number: int, holder: Holder, storage: Storage) -> bool:
    """Creates the lease of this number; False if another run was faster."""
    url = lease_url(output, number)
    try:
        storage.create(url, holder.dump())
    except FileExistsError:
        # Ours after all, where the answer to a first attempt was lost on the way.
        there = _read(output, number, storage)
        if there is None or there.data != holder.dump():
            return False
    if not _decides(url, holder, storage):
        logger.warning(
            "%s: this storage has no create-only write; of two runs that start in the same "
            "%.0f seconds both might go on",
            redact(output), SETTLE_SECONDS,
        )  # fmt: skip
        time.sleep(SETTLE_SECONDS)
        there = _read(output, number, storage)
        if there is None or there.data != holder.dump():
            return False
    # What was succeeded must still be there, or all leases were released and numbered anew.
    numbers = _numbers(output, storage)
    if max(numbers, default=0) == number and (number == 1 or number - 1 in numbers):
        return True
    storage.remove(url)
    return False


def _decides(url: str, holder: Holder, storage: Storage) -> bool:
    """Whether the storage refuses to create what is there: some take the header and ignore it."""
    if not storage.creates_exclusively(url):
        return False
    try:
        storage.create(url, holder.dump())
    except FileExistsError:
        return True
    return False


def _numbers(output: str, storage: Storage) -> list[int]:
    names = storage.iter_files(join(output, RUNS), depth=1)
    return [int(match[1]) for name in names if (match := LEASE.fullmatch(name))]


def _newest(output: str, storage: Storage) -> Found | None:
    """The lease that counts; None if there is none, or it went while it was looked at."""
    numbers = _numbers(output, storage)
    return _read(output, max(numbers), storage) if numbers else None


def _read(output: str, number: int, storage: Storage) -> Found | None:
    url = lease_url(output, number)
    try:
        data = storage.read(url)
    except FileNotFoundError:
        return None
    try:
        return Found(number, data, Holder.parse(data, url))
    except UserError:
        return Found(number, data, None)  # its holder died, or is still, between create and write


def _process(pid: int) -> str:
    """A process as nobody else can be called: boot, PID namespace, number and time of its start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 it is no path
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else f"{boot} {namespace} {pid} {fields[18]}"


def _is_here(holder: Holder) -> bool:
    """Whether this process can see the holder's, were it alive."""
    mine = _process(os.getpid())
    return bool(mine and holder.process) and mine.split()[:2] == holder.process.split()[:2]


def _is_dead(holder: Holder | None) -> bool:
    return holder is not None and _is_here(holder) and _process(holder.pid) != holder.process


def _refuse_if_alive_here(output: str, holder: Holder | None) -> None:
    if holder is not None and _is_here(holder):
        _refuse(output, holder)


def _refuse(output: str, holder: Holder | None) -> None:
    raise UserError(
        f"{redact(output)}: another run is at work there ({_who(holder)}); "
        "let it end or stop it, then run this again"
    )


def _who(holder: Holder | None) -> str:
    if holder is None:
        return "an unknown process"
    return f"process {holder.pid} on {holder.host}, since {holder.taken_at}"
