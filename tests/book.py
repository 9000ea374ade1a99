"""A sink of metrics that keeps what it is given."""

from __future__ import annotations

from collections import Counter

from pipeline.metrics import Metric, Tags


class Book:
    """Names are without `tessera_`, with the values of the tags behind them."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}

    def add(self, metric: Metric, value: float, tags: Tags) -> None:
        assert metric.kind == "counter"
        assert value > 0
        self.counters[self._name(metric, tags)] += value  # type: ignore[assignment]

    def set(self, metric: Metric, value: float, tags: Tags) -> None:
        assert metric.kind == "gauge"
        self.gauges[self._name(metric, tags)] = value

    def _name(self, metric: Metric, tags: Tags) -> str:
        assert tuple(tags) == metric.tags, metric.name
        return " ".join([metric.name.removeprefix("tessera_"), *tags.values()])
