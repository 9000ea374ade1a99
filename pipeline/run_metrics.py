"""Keeps the books of a run's metrics: what each row, shard and commit adds to which of them.

Values go to a `Sink`. They are gathered in plain dictionaries and handed on every few seconds:
about ten series a replica at some 10 µs each, however many rows came.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

from pipeline import metrics
from pipeline.commits import Commit
from pipeline.ledger import CompleteShard
from pipeline.metrics import Metric, Sink
from pipeline.pace import Pace, ReplicaPace, Step
from pipeline.records import Part, Seconds

Series = tuple[Metric, tuple[tuple[str, str], ...]]
PeakFlops = Callable[[str, str], float | None]
Living = Callable[[], set[str]]
FLUSH_SECONDS = 5.0  # Ray's agent collects every ten


class RunMetrics:
    """What the driver tells of its run.

    Args:
        shards: how many the run is to commit.
        tile_flop: work of one tile, for the share of a GPU's peak (None: not known).
        dtype: what replicas compute in.
        peak_flops: peak of a device in a dtype; None where it is not known.
        living: names of the replicas that are there.
    """

    def __init__(
        self,
        sink: Sink,
        shards: int,
        tile_flop: int | None,
        dtype: str,
        peak_flops: PeakFlops,
        living: Living,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._shards = shards
        self._tile_flop = tile_flop
        self._dtype = dtype
        self._peak_flops = peak_flops
        self._living = living
        self._clock = clock
        self._began = self._flushed = clock()
        self._added: defaultdict[Series, float] = defaultdict(float)
        self._pace = Pace()
        self._replicas: dict[tuple[str, str], ReplicaPace] = {}
        self._ended = 0
        self._write_seconds: dict[str, float] = {}

    def part(self, part: Part) -> None:
        """A chunk was written. Each comes here once: the ledger has seen it."""
        rejects = sum(part.rejects.values())
        self._add(metrics.TILES, part.tiles)
        self._add(metrics.REUSED, part.reused)
        self._add(metrics.PICTURES, part.samples - rejects)
        for name, times in part.rejects.items():
            stage, _, code = name.partition("/")
            self._add(metrics.REJECTS, times, stage=stage, code=code)
        self._add_seconds(part.head.seconds)
        self._pace.add(self._clock(), part.tiles)
        self._add_work(part)

    def shard(self, shard: CompleteShard) -> None:
        """All of a shard's chunks have come, whatever becomes of it."""
        if shard.failure is None:
            self._add(metrics.READ_BYTES, shard.end.size)
        for stage, times in shard.deaths.items():
            self._add(metrics.DEATHS, times, stage=stage)
        self._write_seconds[shard.name] = shard.seconds.write

    def committed(self, commit: Commit) -> None:
        """A shard was committed. Its commit counts the seconds of the finalize task as writing."""
        files = [*commit.parts, *([commit.rejects_part] if commit.rejects_part else [])]
        self._add(metrics.OUTPUT_BYTES, sum(file.total_bytes for file in files))
        before = self._write_seconds.pop(commit.shard)
        self._add_seconds(Seconds(write=commit.seconds.write - before))
        self._end("committed")

    def failed(self, name: str) -> None:
        self._write_seconds.pop(name, None)
        self._end("failed")

    def tick(self) -> None:
        """To be called often; hands on every few seconds."""
        if self._clock() >= self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands on what was added, and how things stand now."""
        self._flushed = self._clock()
        for (metric, tags), value in self._added.items():
            self._sink.add(metric, value, dict(tags))
        self._added.clear()
        now = self._clock()
        pending = self._shards - self._ended
        self._sink.set(metrics.PENDING, pending, {})
        self._sink.set(metrics.RATE, self._pace.rate(now), {})
        if self._ended:
            left = (now - self._began) / self._ended * pending
            self._sink.set(metrics.SECONDS_LEFT, left, {})
        self._drop_replicas_that_are_gone(now)
        self._sink.set(metrics.REPLICAS, len(self._replicas), {})
        for (node, replica), pace in self._replicas.items():
            pace.forget(now)
            who = {"node": node, "replica": replica}
            for metric, share in (
                (metrics.BUSY_SHARE, pace.busy_share(now)),
                (metrics.STARVED_SHARE, 1 - pace.busy_share(now)),
                (metrics.REPLICA_RATE, pace.rate(now)),
                (metrics.BATCH_FILL, pace.batch_fill()),
                (metrics.CEILING_SHARE, self._ceiling_share(pace)),
            ):
                if share is not None:
                    self._sink.set(metric, share, who)

    def _drop_replicas_that_are_gone(self, now: float) -> None:
        """One that is silent waits, or has died, or left a pool that shrank: Ray knows."""
        silent = [who for who, pace in self._replicas.items() if pace.silent_seconds(now)]
        if silent:
            living = self._living()
            for who in silent:
                if who[1] not in living:
                    del self._replicas[who]

    def _add(self, metric: Metric, value: float, **tags: str) -> None:
        if value > 0:  # a counter takes nothing else
            self._added[metric, tuple(tags.items())] += value

    def _add_seconds(self, seconds: Seconds) -> None:
        for stage, spent in asdict(seconds).items():
            self._add(metrics.STAGE_SECONDS, spent, stage=stage)

    def _add_work(self, part: Part) -> None:
        work, compute = part.head.work, part.head.compute
        if work is None or compute is None:  # the chunk was given up
            return
        who = {"node": work.node, "replica": work.replica}
        self._add(metrics.REPLICA_TILES, work.tiles, **who)
        self._add(metrics.REPLICA_SECONDS, work.seconds, **who, state="busy")
        self._add(metrics.REPLICA_SECONDS, work.starved_seconds, **who, state="starved")
        pace = self._replicas.setdefault((work.node, work.replica), ReplicaPace(compute))
        step = Step(self._clock(), work.tiles, work.seconds, work.starved_seconds)
        pace.add(step, compute)

    def _ceiling_share(self, pace: ReplicaPace) -> float | None:
        peak = self._peak_flops(pace.compute.device, self._dtype)
        busy = pace.busy_rate()
        if peak is None or busy is None or self._tile_flop is None:
            return None
        return busy * self._tile_flop / (peak * pace.compute.tensor_parallel)

    def _end(self, outcome: str) -> None:
        self._ended += 1
        self._add(metrics.SHARDS, 1, outcome=outcome)
