"""Follows the log of a submitted job to its end, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from jobs.ray_jobs import AWAY, Cluster, Job
from jobs.terminal import BrokenRunError
from pipeline.printable import printable

# Ray's client does not notice a connection that went silent (a laptop that slept, a tunnel that
# hung). A job tells its progress every ten seconds; one that says nothing this long is asked again.
SILENCE_SECONDS = 60.0
PAUSE_SECONDS = (1.0, 15.0)  # between two attempts: the first, and the longest
AWAY_SECONDS = 600.0
LOG_ATTEMPTS = 3


class Shown:
    """What of a log has been written. Ray sends a log from its beginning on each connection."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._count = 0
        self._position = 0

    def begin(self) -> None:
        """A connection: what comes now is the beginning again."""
        self._position = 0

    def feed(self, text: str) -> None:
        """The next piece of this connection."""
        new = text[max(0, self._count - self._position) :]
        self._position += len(text)
        if new:
            self._count = self._position
            self._write("\n".join(map(printable, new.split("\n"))))


def follow(
    cluster: Cluster,
    job_id: str,
    write: Callable[[str], object],
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Job:
    """Writes the job's log until it is over, each character once and in order.

    Raises:
        UnknownJobError: the cluster does not know the job.
        BrokenRunError: the cluster was away for ten minutes.
    """
    shown = Shown(write)
    heard, wait = clock(), PAUSE_SECONDS[0]
    while True:
        try:
            job = cluster.job(job_id)
            heard = clock()
            if not job.over:
                shown.begin()
                asyncio.run(_pour(cluster, job_id, shown))
                job = cluster.job(job_id)
            heard, wait = clock(), PAUSE_SECONDS[0]
            if job.over:
                _finish(cluster, job_id, shown, pause)
                return job
            pause(wait)  # the connection was closed early, or had nothing to say
        except (*AWAY, BrokenRunError) as error:
            if clock() - heard > AWAY_SECONDS:
                raise BrokenRunError(
                    f"the cluster has not answered for {AWAY_SECONDS:.0f} s "
                    f"({type(error).__name__}); the job may be going on: "
                    f"tessera submit --follow {job_id}"
                ) from error
            if wait == PAUSE_SECONDS[0]:
                print("tessera: the connection is lost; trying again", file=sys.stderr, flush=True)
            pause(wait)
            wait = min(2 * wait, PAUSE_SECONDS[1])


def to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _finish(cluster: Cluster, job_id: str, shown: Shown, pause: Callable[[float], object]) -> None:
    """What the connections did not bring any more."""
    for attempt in range(1, LOG_ATTEMPTS + 1):
        try:
            log = cluster.log(job_id)
        except BrokenRunError as error:
            if attempt == LOG_ATTEMPTS:  # its node is gone, and the log with it
                said = f"tessera: the end of the log cannot be read: {error}"
                print(said, file=sys.stderr, flush=True)
                return
            pause(PAUSE_SECONDS[0])
        else:
            shown.begin()
            shown.feed(log)
            return


async def _pour(cluster: Cluster, job_id: str, shown: Shown) -> None:
    """One connection, until it ends, breaks, or goes silent."""
    pieces = cluster.client.tail_job_logs(job_id)
    try:
        while True:
            shown.feed(await asyncio.wait_for(anext(pieces), SILENCE_SECONDS))
    except StopAsyncIteration:
        return
    except (TimeoutError, RuntimeError):  # silent, or closed in the middle: how it is, the job says
        return
    finally:
        await pieces.aclose()
