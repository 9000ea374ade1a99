"""The dashboard is Grafana's JSON, and asks for metrics that exist."""

from __future__ import annotations

import json
from collections.abc import Iterator

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from pipeline.metrics import METRICS
from tests.builders import REPOSITORY
from tests.dashboards import METRIC, dashboard, expressions, panels


def differences(ours: object, theirs: object, path: str = "") -> Iterator[str]:
    """What of our document is not in theirs; they may add defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key in theirs:
                yield from differences(value, theirs[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for at, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(mine, other, f"{path}[{at}]")
    elif ours != theirs:
        yield path


def test_grafanas_own_types_take_all_of_it() -> None:
    """A field that they do not know would be lost on the way."""
    plugins.register_default_plugins()
    read = Dashboard.from_json(dashboard())
    assert list(differences(dashboard(), json.loads(JSONEncoder().encode(read)))) == []
    assert list(differences({"panels": [{"legendary": 1}]}, {"panels": [{}]})) == [
        ".panels[0].legendary"
    ]


def test_every_metric_of_ours_is_shown_and_exists() -> None:
    asked = {name for query in expressions() for name in METRIC.findall(query)}
    ours = {name for name in asked if name.startswith("ray_tessera_")}
    told_elsewhere = {"ray_tessera_replica_tiles_total", "ray_tessera_replica_busy_share"}
    assert ours == {metric.exported for metric in METRICS} - told_elsewhere


def test_every_metric_is_in_the_guide() -> None:
    guide = (REPOSITORY / "docs/watching.md").read_text()
    for metric in METRICS:
        assert f"`{metric.exported}`" in guide, metric.exported
        assert f"| {metric.description.rstrip('.')} |" in guide, metric.name


def test_panels_neither_overlap_nor_share_an_id_and_use_the_chosen_source() -> None:
    document = dashboard()
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(panels()) >= 20
    for panel in panels():
        assert panel["description"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_variables_are_named_as_in_rays_own_dashboards() -> None:
    variables = dashboard()["templating"]["list"]
    assert [v["name"] for v in variables] == ["datasource", "SessionName", "run"]
    assert (variables[0]["type"], variables[0]["query"]) == ("datasource", "prometheus")
