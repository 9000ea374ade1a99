"""Ray's Jobs API as the commands use it: its errors as one line, its ends as exit statuses."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from jobs.local_ray import keep_token_private, warn_without_authentication
from jobs.terminal import BrokenRunError
from model.errors import UserError

ADDRESS = "RAY_API_SERVER_ADDRESS"  # what Ray's client reads before RAY_ADDRESS
REQUEST_SECONDS = 60.0
# What a request raises while a cluster, or the way to it, is away.
AWAY = (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError)
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
STOPPED_STATUS = 128 + signal.SIGTERM  # what a stopped entry point was told to end by


class UnknownJobError(UserError):
    """The cluster has no job of that id."""


class KnownJobError(UserError):
    """The cluster has a job of that id already."""


class UnreachableError(UserError):
    """No cluster answers at that address, for now."""


@dataclass(frozen=True)
class Job:
    """A submitted job as its cluster tells of it. Times are Unix seconds."""

    id: str
    status: str
    message: str
    entrypoint: str
    metadata: dict[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def over(self) -> bool:
        return self.status in ENDED

    @property
    def exit_status(self) -> int:
        """Of the job, for a shell: its entry point's own; 143 where it was stopped; 1 where Ray
        could not run it."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return STOPPED_STATUS
        if self.exit_code is None:
            return 1
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


class Cluster:
    """The Jobs API of one cluster."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def job(self, job_id: str) -> Job:
        """Raises: UnknownJobError, and what `AWAY` lists."""
        with explained(job_id):
            return _job(self.client.get_job_info(job_id))

    def jobs(self) -> list[Job]:
        """Those that were submitted, the newest last; not drivers that connected by themselves."""
        with explained():
            found = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0)

    def stop(self, job_id: str) -> bool:
        """Asks a job to end; gives whether it was going on."""
        job = self.job(job_id)
        with explained(job_id):
            self.client.stop_job(job_id)
        return not job.over

    def log(self, job_id: str) -> str:
        with explained(job_id):
            return str(self.client.get_job_logs(job_id))


def connect(address: str | None) -> Cluster:
    """The cluster at `address`, or where Ray's variables say.

    None is looked for: what is found on a machine may be another user's, to whom this one's token
    would go.

    Raises:
        UserError: no address, or the cluster wants another token.
        UnreachableError: nothing answers there.
    """
    given = address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS")
    if not given or given == "local":
        raise UserError(
            "no cluster: give --address http://127.0.0.1:8265 (the dashboard of the head; "
            "`ssh -L 8265:127.0.0.1:8265 HEAD` brings it here), or set RAY_ADDRESS"
        )
    if address:
        os.environ[ADDRESS] = address  # or Ray's client would take RAY_ADDRESS, whatever it is told
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):  # they have levels of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    warn_without_authentication()
    keep_token_private(create=False)
    # Without RAY_AUTH_MODE Ray's client sends no token, though its clusters ask for one.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with explained():
            return Cluster(_Client(given))
    except AWAY as error:
        raise UnreachableError(f"{given}: no Ray cluster answers there") from error
    except BrokenRunError as error:
        raise UnreachableError(f"{given}: {error}") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, whose requests would wait for ever for an answer that does not come."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, timeout=REQUEST_SECONDS, **options)


@contextmanager
def explained(job_id: str = "") -> Iterator[None]:
    """Turns what Ray's client raises into one line; what `AWAY` lists passes."""
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            "the Ray cluster refuses this user's token; give its own in RAY_AUTH_TOKEN, "
            "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error
    except RuntimeError as error:  # all it has to say of an answer other than 200
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        if "status code 404" in lines[0] and job_id:
            raise UnknownJobError(f"job {job_id}: this cluster does not know it") from error
        if "already exists" in str(error):
            raise KnownJobError(f"job {job_id}: the cluster has one of that id already") from error
        raise BrokenRunError(f"the cluster's Jobs API: {lines[-1].strip()}") from error


@contextmanager
def answering() -> Iterator[None]:
    """Turns a cluster that does not answer into one line, where nobody waits for it."""
    try:
        yield
    except AWAY as error:
        raise BrokenRunError(f"the cluster does not answer ({type(error).__name__})") from error


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=dict(details.metadata or {}),
        started=None if not details.start_time else details.start_time / 1000,
        ended=None if not details.end_time else details.end_time / 1000,
        exit_code=details.driver_exit_code,
    )
