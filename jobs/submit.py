"""`tessera submit`: a command of this project as a job of a Ray cluster."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.follow import follow, to_stdout
from jobs.ray_jobs import AWAY, Cluster, Job, explained
from jobs.shipping import pack
from jobs.submission import Submission
from jobs.terminal import BrokenRunError
from model.errors import UserError
from pipeline.printable import printable

# Ray kills an entry point this long after it told it to end. A run that is told so commits the
# shards that are complete, and gives OUTPUT back; large ones on a slow store take minutes.
STOP_SECONDS = 300
INTERRUPTED = 130


@dataclass(frozen=True)
class Place:
    """What the entry point itself takes of the cluster.

    Nothing, by default: Ray then runs it on the head. A run's driver wants about one CPU and must
    outlive every worker, and `cluster.yaml` keeps the head on demand and free of tasks (a head
    with 0 CPUs could not give it one either). With any of these set Ray may put it on a worker.
    """

    num_cpus: float | None = None
    resources: Mapping[str, float] | None = None


def submit(
    cluster: Cluster, submission: Submission, place: Place, job_id: str | None = None
) -> str:
    """Hands a job to the cluster, with its code; gives its id.

    Raises:
        UserError: the cluster has a job of that id, or refuses.
        BrokenRunError: this machine's disk, or the cluster, failed; or no answer came.
    """
    job_id = job_id or f"tessera-{secrets.token_hex(6)}"  # known, whatever becomes of the answer
    with tempfile.TemporaryDirectory(prefix="tessera-submit-") as name:
        folder = Path(name) / "job"
        try:
            folder.mkdir()
            pack(folder, submission.files)
        except OSError as error:
            # copytree goes on, and tells of every file.
            first = error.args[0][0][2] if isinstance(error, shutil.Error) else error
            raise BrokenRunError(f"the job's files cannot be put into {name}: {first}") from error
        try:
            with explained(job_id):
                return str(
                    cluster.client.submit_job(
                        entrypoint=submission.entrypoint,
                        submission_id=job_id,
                        runtime_env={
                            "working_dir": str(folder),
                            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                        },
                        metadata=dict(submission.metadata),
                        entrypoint_num_cpus=place.num_cpus,
                        entrypoint_resources=dict(place.resources) if place.resources else None,
                    )
                )
        except AWAY as error:
            raise BrokenRunError(
                f"no answer came from the cluster ({type(error).__name__}), which may have taken "
                f"the job: tessera submit --follow {job_id}"
            ) from error


def follow_to_end(cluster: Cluster, job_id: str) -> int:
    """Shows a job's log until it is over; gives its exit status. Ctrl-C leaves the job alone."""
    try:
        job = follow(cluster, job_id, to_stdout)
    except KeyboardInterrupt:
        print(
            f"tessera: job {job_id} goes on; tessera submit --follow {job_id} shows it again, "
            f"tessera submit --stop {job_id} ends it",
            file=sys.stderr,
        )
        return INTERRUPTED
    if job.status != "SUCCEEDED":
        print(f"tessera: job {job_id}: {_end(job)}", file=sys.stderr)
    return job.exit_status


def _end(job: Job) -> str:
    if job.status == "STOPPED":
        return "stopped"
    if job.exit_code is not None:
        return f"failed with exit status {job.exit_status}"
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    return printable(f"Ray could not run it: {lines[-1] if lines else 'it does not say why'}")


def show_jobs(jobs: list[Job], as_json: bool) -> None:
    """One line a job, the newest last."""
    if as_json:
        print(json.dumps([asdict(job) for job in jobs], indent=1))
        return
    width = max((len(job.id) for job in jobs), default=0)
    for job in jobs:
        about = job.metadata
        what = f"{about['verb']} {about.get('output', '')}" if "verb" in about else job.entrypoint
        print(printable(f"{job.id:{width}}  {job.status:9}  {_when(job):32}  {what}"))
    if not jobs:
        print("no jobs", file=sys.stderr)


def _when(job: Job) -> str:
    if job.started is None:
        return ""
    began = datetime.fromtimestamp(job.started, UTC)
    spent = (job.ended or datetime.now(UTC).timestamp()) - job.started
    return f"{began:%Y-%m-%d %H:%M:%S} UTC, {spent:.0f} s"


def parse_resources(text: str | None) -> dict[str, float] | None:
    """`--entrypoint-resources`.

    Raises:
        UserError: no JSON object of numbers.
    """
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise UserError(f"--entrypoint-resources: expected a JSON object: {error}") from error
    if not isinstance(parsed, dict) or not all(
        isinstance(amount, int | float) and not isinstance(amount, bool)
        for amount in parsed.values()
    ):
        raise UserError('--entrypoint-resources: expected names and numbers, as {"driver": 1}')
    return parsed
