"""Takes the pictures in docs/images: a real run on a Ray head of its own, watched by Prometheus.

    python -m benchmarks.screenshots [--folder docs/images] [--only browse]

Needs Debian's prometheus and chromium; `--only browse`, the page of `tessera browse`, chromium
alone, and no Ray. Grafana is in no registry; what its dashboard asks is asked of Prometheus itself
(`query_range`) and drawn by the charts of the report.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.browse_pictures import photograph_browse
from benchmarks.browser import Page, browser
from jobs.html_charts import Bar, columns
from jobs.html_elements import Html, element
from jobs.report import write_report
from tests.builders import REPOSITORY, picture, run_cli, sample, write_checkpoint, write_tar
from tests.dashboards import panels
from tests.ports import free_ports
from tests.prometheus import Prometheus, prometheus
from tests.ray_head import Head, ray_head

SHARDS, PICTURES = 160, 30  # about two minutes on two cores
SHOWN_PANELS = (
    "Replicas: busy and starved, all together",
    "Work by stage",
    "Tiles and pictures a second",
    "Rejects by code",
)
STEP_SECONDS = 2
WINDOW = "[30s]"  # of rates, where the dashboard has a minute: the run is short
DESKTOP, PHONE = 1180, 390
RAY_WIDTH, RAY_HEIGHT = 1500, 640  # its bar of buttons wants room
LABEL = re.compile(r"{{(\w+)}}")
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 300


def make_input(folder: Path) -> None:
    """Shards as img2dataset writes them, some with pictures that are none or that break off."""
    for shard in range(SHARDS):
        members = []
        for index in range(PICTURES):
            width = 220 + 37 * ((shard + index) % 14)
            image = picture(width, 240 + 23 * (index % 9), seed=100 * shard + index)
            if (shard + index) % 17 == 3:
                image = image[: len(image) * 2 // 3]
            elif (shard + index) % 41 == 7:
                image = b"<html>404</html>"
            members += sample(f"{shard:05d}{index:04d}", image, "a caption", url="u")
        write_tar(folder / f"in/{shard:05d}.tar", members)
    write_checkpoint(folder / "model", image_size=224)


def job_options(folder: Path) -> list[str]:
    """What is planned, and done."""
    return (
        f"--model {folder}/model --dtype float32 --tiling dynamic --max-tiles 6 "
        "--features cls,mean --max-reject-rate 0.5 --replicas 2"
    ).split()


def write_plan(folder: Path) -> Path:
    done = run_cli("plan", folder / "in", *job_options(folder), "--fleet", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    file = folder / "plan.json"
    file.write_text(done.stdout)
    return file


def submit(client: JobSubmissionClient, folder: Path) -> str:
    words = " ".join(["extract", f"{folder}/in", f"{folder}/out", *job_options(folder)])
    job: str = client.submit_job(
        entrypoint=f"python -m jobs.cli {words}",
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "auto"}},
        metadata={"input": "in", "output": "out"},
    )
    return job


async def wait_for_job(client: JobSubmissionClient, job: str) -> None:
    for _ in range(int(PATIENCE_SECONDS / LOOK_SECONDS)):
        status = client.get_job_status(job)
        assert status not in (JobStatus.FAILED, JobStatus.STOPPED), client.get_job_logs(job)
        if status == JobStatus.SUCCEEDED:
            return
        await asyncio.sleep(LOOK_SECONDS)
    raise AssertionError("the job does not end")


async def wait_for_tiles(server: Prometheus, client: JobSubmissionClient, job: str) -> None:
    for _ in range(int(PATIENCE_SECONDS / LOOK_SECONDS)):
        if server.query("sum(ray_tessera_tiles_total) > 200"):
            return
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        await asyncio.sleep(LOOK_SECONDS)
    raise AssertionError("no tile is told")


def bearer(head: Head) -> dict[str, str]:
    return {"Authorization": f"Bearer {head.env['RAY_AUTH_TOKEN']}"}


async def photograph_ray(page: Page, head: Head, folder: Path) -> None:
    """The overview and the list of jobs, with our job running."""
    await page.open(f"{head.url}/#/jobs", RAY_WIDTH, RAY_HEIGHT, bearer(head))
    await page.wait_for_text("jobs.cli extract", "RUNNING")
    await page.photograph(folder / "ray-dashboard.png", most=RAY_HEIGHT)


def metrics_page(server: Prometheus, began: float) -> str:
    """What some panels of the dashboard show, over the whole run."""
    ended = time.time()
    shown = [_panel(server, panel, began, ended) for panel in panels()
             if panel["title"] in SHOWN_PANELS]  # fmt: skip
    assert len(shown) == len(SHOWN_PANELS)
    css = (REPOSITORY / "jobs/report.css").read_text()
    head = element("head", element("meta", charset="utf-8"), element("style", Html(css)))
    title = element("h1", "Metrics of a run, as Prometheus has them")
    grid = element("div", *shown, style="display:grid;grid-template-columns:1fr 1fr;gap:0 32px")
    return f"<!doctype html>{element('html', head, element('body', title, grid))}"


def _panel(server: Prometheus, panel: dict[str, object], began: float, ended: float) -> Html:
    parts = [element("h2", str(panel["title"])), element("p", str(panel["description"]))]
    targets: Sequence[dict[str, str]] = panel["targets"]  # type: ignore[assignment]
    for target in targets:
        query = target["expr"].replace('run=~"$run", SessionName=~"$SessionName"', "")
        query = query.replace("{}", "").replace("[1m]", WINDOW)
        found = server.get("query_range", query=query, start=began, end=ended, step=STEP_SECONDS)
        parts.append(element("p", query, class_="note"))
        for series in found["result"]:
            labels = series["metric"]
            name = LABEL.sub(lambda found, labels=labels: labels[found[1]], target["legendFormat"])
            values = [(float(at), float(value)) for at, value in series["values"]]
            parts.append(_series(name, values, began, ended))
    return element("section", *parts)


def _series(name: str, values: Sequence[tuple[float, float]], began: float, ended: float) -> Html:
    """Columns over the whole run; a series that begins later has none before."""
    by_step = {round((at - began) / STEP_SECONDS): value for at, value in values}
    steps = range(round((ended - began) / STEP_SECONDS) + 1)
    top = f"{name}: at most {max(by_step.values()):.3g}, last {values[-1][1]:.3g}"
    rows = [Bar("", by_step.get(step, 0.0)) for step in steps]
    return columns(rows, _clock(began), _clock(ended), top)


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%H:%M:%S} UTC"


async def take_browse(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tessera-pictures-") as name:
        await photograph_browse(Path(name), folder)


async def take_run(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tessera-pictures-") as name:
        work = Path(name)
        make_input(work)
        planned = write_plan(work)
        (port,) = free_ports(1)
        os.environ["RAY_PROMETHEUS_HOST"] = f"http://127.0.0.1:{port}"
        with (
            ray_head(num_cpus=8) as head,
            prometheus(head.folder / "session_latest", port) as server,
        ):
            client = JobSubmissionClient(head.url, headers=bearer(head))
            began = time.time()
            job = submit(client, work)
            await wait_for_tiles(server, client, job)
            async with browser() as page:
                await photograph_ray(page, head, folder)
                await wait_for_job(client, job)
                (work / "metrics.html").write_text(metrics_page(server, began))
                await photograph_file(page, work / "metrics.html", folder / "metrics.png", DESKTOP)
        write_report(str(work / "out"), work / "report.html", planned)
        async with browser() as page:
            await photograph_file(page, work / "report.html", folder / "report.png", DESKTOP)
            await photograph_file(page, work / "report.html", folder / "report-phone.png", PHONE)


async def photograph_file(page: Page, file: Path, picture: Path, width: int) -> None:
    await page.open(file.as_uri(), width, 900)
    await page.wait_for("document.readyState == 'complete' && document.body.innerText.length > 99")
    assert await page.width() <= width, f"{file.name} is wider than {width} pixels"
    await page.photograph(picture)


TAKERS = {"run": take_run, "browse": take_browse}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures in docs/images.")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "docs/images")
    parser.add_argument("--only", choices=TAKERS, help="what to take; both where it is not given")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, take in TAKERS.items():
        if options.only in (None, name):
            asyncio.run(take(options.folder))


if __name__ == "__main__":
    main()
