"""The metrics of a run: their names and what they mean.

All come from the driver, which alone sees each row once however often its task was tried.
Prometheus finds them as `ray_<name>`, counters as `ray_<name>_total` (`pipeline.ray_metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Tags = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """One family. Each of its series has the tag `run` too."""

    kind: Literal["counter", "gauge"]
    name: str
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


TILES = Metric("counter", "tessera_tiles", "Tiles written, those taken over included.")
REUSED = Metric(
    "counter", "tessera_reused_tiles", "Tiles taken over from older commits, not computed again."
)
PICTURES = Metric("counter", "tessera_pictures", "Pictures embedded and written.")
REJECTS = Metric("counter", "tessera_rejects", "Samples that gave no embedding.", ("stage", "code"))
SHARDS = Metric(
    "counter", "tessera_shards", "Shards that came to an end: committed or failed.", ("outcome",)
)
PENDING = Metric("gauge", "tessera_shards_pending", "Shards of this run that are still to come.")
READ_BYTES = Metric("counter", "tessera_read_bytes", "Bytes of the shards that were read whole.")
OUTPUT_BYTES = Metric("counter", "tessera_output_bytes", "Bytes of the committed output objects.")
STAGE_SECONDS = Metric(
    "counter",
    "tessera_stage_seconds",
    "Seconds of work, summed over all tasks of a stage: read, tile, embed, write.",
    ("stage",),
)
DEATHS = Metric(
    "counter",
    "tessera_deaths",
    "Workers (stage tile) and replicas (stage embed) that died at work; others took it up.",
    ("stage",),
)
REPLICAS = Metric("gauge", "tessera_replicas", "Replicas that gave something and are still there.")
REPLICA_TILES = Metric(
    "counter", "tessera_replica_tiles", "Tiles that a replica computed.", ("node", "replica")
)
REPLICA_SECONDS = Metric(
    "counter",
    "tessera_replica_seconds",
    "Seconds of a replica: busy (computing) or starved (waiting for tiles).",
    ("node", "replica", "state"),
)
BUSY_SHARE = Metric(
    "gauge", "tessera_replica_busy_share", "Share of its time, 0 to 1, in which a replica computed "
    "during the last minutes.", ("node", "replica"),
)  # fmt: skip
STARVED_SHARE = Metric(
    "gauge", "tessera_replica_starved_share", "Share of its time, 0 to 1, in which a replica "
    "waited for tiles during the last minutes.", ("node", "replica"),
)  # fmt: skip
REPLICA_RATE = Metric(
    "gauge", "tessera_replica_tiles_per_second", "Tiles/s of a replica during the last minutes, "
    "waiting included.", ("node", "replica"),
)  # fmt: skip
CEILING_SHARE = Metric(
    "gauge", "tessera_replica_ceiling_share", "Share, 0 to 1, that a replica reached of its GPUs' "
    "peak of dense matrix products while it computed; only for GPUs whose peak is known.",
    ("node", "replica"),
)  # fmt: skip
BATCH_FILL = Metric(
    "gauge", "tessera_batch_fill", "Share, 0 to 1, of the places in a replica's forward passes "
    "that tiles took.", ("node", "replica"),
)  # fmt: skip
RATE = Metric("gauge", "tessera_tiles_per_second", "Tiles/s of the run during the last minutes.")
SECONDS_LEFT = Metric(
    "gauge",
    "tessera_seconds_left",
    "Seconds until the last shard is committed, at the pace so far.",
)

METRICS = (
    TILES, REUSED, PICTURES, REJECTS, SHARDS, PENDING, READ_BYTES, OUTPUT_BYTES, STAGE_SECONDS,
    DEATHS, REPLICAS, REPLICA_TILES, REPLICA_SECONDS, BUSY_SHARE, STARVED_SHARE, REPLICA_RATE,
    CEILING_SHARE, BATCH_FILL, RATE, SECONDS_LEFT,
)  # fmt: skip


class Sink(Protocol):
    """Where values go."""

    def add(self, metric: Metric, value: float, tags: Tags) -> None:
        """Adds to a counter; `value` is above 0."""

    def set(self, metric: Metric, value: float, tags: Tags) -> None:
        """Sets a gauge."""
