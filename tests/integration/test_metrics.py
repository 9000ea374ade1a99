"""A real run, watched by Debian's Prometheus: every metric has the value that the commits say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline import metrics
from pipeline.commits import Commit
from pipeline.metrics import METRICS, Metric
from tests.builders import run_cli, samples, write_checkpoint, write_tar
from tests.dashboards import METRIC, expressions
from tests.prometheus import Prometheus, Series, prometheus
from tests.ray_head import ray_head

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(1800)]

MEMBERS = 3
BATCH = 4
FILLED = 9 / 12  # 5 tiles take two forward passes of 4 places, 4 one
# Nothing dies, nothing is taken over, and a CPU's peak is not known.
NEVER_HERE = {metrics.DEATHS, metrics.REUSED, metrics.CEILING_SHARE}


@dataclass(frozen=True)
class Watched:
    """A run that has ended, and the server that saw it."""

    server: Prometheus
    commits: list[Commit]
    folder: Path
    session: Path

    def values(self, metric: Metric) -> list[Series]:
        """The last value of each series, also of gauges that are told no more."""
        return self.server.query(f"last_over_time({metric.exported}[10m])")

    def value(self, metric: Metric, **tags: str) -> float:
        (found,) = [s for s in self.values(metric) if tags.items() <= s.labels.items()]
        return found.value


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Shard `a`: 7 pictures, two of them no pictures; `b`: 5, one missing; `c` is cut off."""
    folder = tmp_path_factory.mktemp("watched")
    members = samples(7, seed=1)
    for bad in (2, 5):
        members[bad * MEMBERS] = (members[bad * MEMBERS][0], b"no picture")
    write_tar(folder / "in/a.tar", members)
    members = samples(5, seed=2)
    del members[3 * MEMBERS]
    write_tar(folder / "in/b.tar", members)
    whole = write_tar(folder / "in/c.tar", samples(4, seed=3))
    whole.write_bytes(whole.read_bytes()[:20_000])
    write_checkpoint(folder / "model", image_size=56)
    with ray_head(num_cpus=6) as head, prometheus(head.folder / "session_latest") as server:
        done = run_cli(
            "extract", folder / "in", folder / "out", "--model", folder / "model",
            "--dtype", "float32", "--batch-tiles", str(BATCH), "--max-reject-rate", "0.5",
            env={**head.env, "RAY_ADDRESS": head.address},
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "failed: c: " in done.stdout
        commits = [
            Commit.parse((folder / f"out/commits/{name}.json").read_bytes(), name) for name in "ab"
        ]
        watched = Watched(server, commits, folder, head.folder / "session_latest")
        server.wait_until(
            lambda: sum(s.value for s in watched.values(metrics.SHARDS)) == 3,
            "three shards",
        )
        ends = {metrics.PENDING: 0, metrics.SECONDS_LEFT: 0, metrics.BATCH_FILL: FILLED}
        for metric, value in ends.items():  # in the order in which they are set
            server.wait_until(
                lambda m=metric, v=value: [s.value for s in watched.values(m)] == [v],  # type: ignore[misc]
                f"{metric.name} {value}",
            )
        yield watched


def test_counters_equal_the_sums_of_the_commits(watched: Watched) -> None:
    commits = watched.commits
    assert watched.value(metrics.TILES) == sum(c.tiles for c in commits) == 5 + 4
    assert watched.value(metrics.PICTURES) == 9
    assert watched.value(metrics.REJECTS, stage="decode", code="unidentified") == 2
    assert watched.value(metrics.REJECTS, stage="read", code="no-image") == 1
    assert len(watched.values(metrics.REJECTS)) == 2
    assert watched.value(metrics.SHARDS, outcome="committed") == 2
    assert watched.value(metrics.SHARDS, outcome="failed") == 1
    sizes = [(watched.folder / f"in/{name}.tar").stat().st_size for name in "ab"]
    assert watched.value(metrics.READ_BYTES) == sum(sizes)
    files = [*watched.folder.glob("out/embeddings/*"), *watched.folder.glob("out/rejects/*")]
    assert watched.value(metrics.OUTPUT_BYTES) == sum(file.stat().st_size for file in files)
    for stage in ("read", "tile", "embed", "write"):
        spent = sum(getattr(commit.seconds, stage) for commit in commits)
        told = watched.value(metrics.STAGE_SECONDS, stage=stage)
        assert told >= spent - 0.01, stage  # the failed shard took some time too


def test_the_replica_is_told_as_in_the_commits(watched: Watched) -> None:
    (embedder,) = {(e.node, e.replica) for c in watched.commits for e in c.replicas}
    who = {"node": embedder[0], "replica": embedder[1]}
    done = [e for c in watched.commits for e in c.replicas]
    assert watched.value(metrics.REPLICA_TILES, **who) == sum(e.tiles for e in done) == 9
    busy = watched.value(metrics.REPLICA_SECONDS, **who, state="busy")
    spent = sum(e.seconds for e in done)
    assert busy >= spent - 0.01
    starved = watched.value(metrics.REPLICA_SECONDS, **who, state="starved")
    assert starved > 0
    (most,) = watched.server.query(f"max_over_time({metrics.REPLICAS.exported}[10m])")
    assert most.value == 1
    # The gauges are of the last look; a replica that is silent after its last chunk starves on.
    share = watched.value(metrics.BUSY_SHARE, **who)
    assert 0 < share <= busy / (busy + starved) * 1.001
    assert watched.value(metrics.STARVED_SHARE, **who) == pytest.approx(1 - share)
    assert 0 < watched.value(metrics.REPLICA_RATE, **who) <= 9 / (busy + starved) * 1.001
    assert watched.value(metrics.BATCH_FILL, **who) == FILLED


def test_at_the_end_nothing_is_pending(watched: Watched) -> None:
    assert watched.value(metrics.PENDING) == 0
    assert watched.value(metrics.SECONDS_LEFT) == 0
    assert watched.value(metrics.RATE) >= 0


def test_every_metric_is_there_and_names_its_run_alone(watched: Watched) -> None:
    runs = set()
    for metric in METRICS:
        found = watched.values(metric)
        assert bool(found) == (metric not in NEVER_HERE), metric.name
        for series in found:
            assert {"run", *metric.tags} <= set(series.labels), metric.name
            assert not any("/" in value for name, value in series.labels.items()
                           if name in ("run", *metric.tags))  # fmt: skip
            runs.add(series.labels["run"])
    assert len(runs) == 1


def test_prometheus_answers_what_the_dashboard_asks(watched: Watched) -> None:
    asked = expressions()
    assert len(asked) > 20
    for expression in asked:
        watched.server.query(expression)
    expected = {name for expression in asked for name in METRIC.findall(expression)}
    expected -= {metric.exported for metric in NEVER_HERE}
    # Ray's own come from another process, up to a report interval after ours.
    watched.server.wait_until(
        lambda: expected <= set(watched.server.get("label/__name__/values")), f"all of {expected}"
    )


def test_grafana_is_told_to_read_the_folder_that_ours_is_copied_to(watched: Watched) -> None:
    """As docs/watching.md has it."""
    grafana = watched.session / "metrics/grafana"
    told = (grafana / "provisioning/dashboards/default.yml").read_text()
    (folder,) = [Path(p["options"]["path"]) for p in yaml.safe_load(told)["providers"]]
    assert folder.samefile(grafana / "dashboards")
    assert (folder / "data_grafana_dashboard.json").exists()
