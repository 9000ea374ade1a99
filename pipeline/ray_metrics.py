"""The way of a run's metrics to Prometheus: Ray's agent of the node collects and exports them."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from pipeline.metrics import Metric, Tags


class RaySink:
    """Ray's metrics, each made when it first has a value. Works between `init` and `shutdown`."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}

    def add(self, metric: Metric, value: float, tags: Tags) -> None:
        if metric.name not in self._counters:
            self._counters[metric.name] = self._make(Counter, metric)
        self._counters[metric.name].inc(value, tags=dict(tags))

    def set(self, metric: Metric, value: float, tags: Tags) -> None:
        if metric.name not in self._gauges:
            self._gauges[metric.name] = self._make(Gauge, metric)
        self._gauges[metric.name].set(value, tags=dict(tags))

    def _make(self, kind: type[Counter] | type[Gauge], metric: Metric) -> Counter | Gauge:
        made = kind(metric.name, metric.description, ("run", *metric.tags))
        return made.set_default_tags({"run": self._run})
