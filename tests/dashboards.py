"""The Grafana dashboard as tests look at it."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.builders import REPOSITORY

DASHBOARD = REPOSITORY / "deploy/grafana/tessera.json"
METRIC = re.compile(r"\bray_\w+")


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def panels() -> list[dict[str, Any]]:
    """Those that show something: not the titles of rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """What the panels ask Prometheus, over all runs and sessions."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [query.replace("$run", ".+").replace("$SessionName", ".+") for query in asked]
