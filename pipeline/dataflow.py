"""The flow through Ray Data: feed → read → tile → embed → write, then a finalize task a shard.

One row = one chunk = one block: with `target_max_block_size = 1` Ray neither merges nor slices
blocks, so chunks of different shards never mix. The driver sees small rows only and keeps the
ledger. One execution takes all shards of a run, however many: replicas load their model once.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.exceptions import RayError

from model.errors import UserError
from model.peaks import peak_flops
from pipeline.attempts import ActorAttempts
from pipeline.chunks import TileSettings
from pipeline.commits import Commit, Failure
from pipeline.interruption import FlowStopped, Interruption
from pipeline.ledger import CompleteShard, Ledger
from pipeline.long_runs import DropBlockStats, QueueLimit
from pipeline.ray_metrics import RaySink
from pipeline.records import Part, Shard
from pipeline.replica import Replica, ReplicaSettings, living_replicas, remember_deaths
from pipeline.run_metrics import RunMetrics
from pipeline.samples import ReadSettings
from pipeline.stages import feed_stage, finalize_stage, read_stage, tile_stage, write_stage
from pipeline.storage import CredentialsError
from pipeline.writers import FinalizeSettings

logger = logging.getLogger(__name__)

# Shards in one input block. A block a shard would cost 1.2 s for 1 k shards, 131 s for 100 k.
FEED_SHARDS = 500
REFUSED = f"{CredentialsError.__name__}: "  # in the reason of a failure, whichever task had it
IO_CPUS = 0.25  # reading and writing wait more than they compute
TILE_CPUS = 1.0
CPU_REPLICA_CPUS = 0.5  # unlike TILE_CPUS, or Ray would fuse tiling into the actor
TICK_SECONDS = 0.5
# Ray gives tasks of a different environment processes of their own. Without one any worker comes to
# tile at some time, and then holds a decoder, torch (`fast`) and its heap: 150-270 MiB each.
TILE_WORKERS = {"env_vars": {"TESSERA_STAGE": "tile"}}


@dataclass(frozen=True)
class FlowSettings:
    """Everything the stages need.

    Args:
        replicas: smallest and largest size of the pool.
        num_io_tasks: shards read at once, so that a shard's parts come close together; parts
            written at once; shards finalized at once.
        num_tile_tasks: groups tiled at once (None: as many as there are CPUs).
        buffer_bytes: what may wait between the stages (None: half of Ray's object store).
        tile_flop: work of one tile, for the metrics (None: not known).
    """

    read: ReadSettings
    tile: TileSettings
    replica: ReplicaSettings
    finalize: FinalizeSettings
    replicas: tuple[int, int]
    num_io_tasks: int
    num_tile_tasks: int | None
    max_reject_rate: float
    buffer_bytes: int | None = None
    tile_flop: int | None = None


@dataclass
class Tally:
    """How far a run is. Tiles and rejects are counted when their part is written; `reused` of the
    tiles were taken over from older commits."""

    shards: int
    committed: int = 0
    tiles: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    samples: int = 0
    reused: int = 0


def run_shards(
    shards: Sequence[Shard],
    settings: FlowSettings,
    tick: Callable[[Tally], None],
    stop: threading.Event,
    assure: Callable[[], None] = lambda: None,
) -> Tally:
    """Computes and commits shards until all are done or `stop` is set.

    `tick` is called about twice a second, `assure` before each commit: it raises where the output
    is no longer this run's. When stopped, shards whose parts have all come are
    still committed.

    Raises:
        ray.exceptions.RayError: the flow itself broke; what is committed stays.
        LedgerError: a chunk came twice.
    """
    tally = Tally(len(shards))
    if not stop.is_set():
        Flow(shards, settings, tally, stop, assure).run(tick)
    return tally


class Flow:
    """One execution of the dataset, and the finalize tasks that follow from it."""

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: FlowSettings,
        tally: Tally,
        stop: threading.Event,
        assure: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._assure = assure
        self._tally = tally
        self._stop = stop
        self._ledger = Ledger(shard.name for shard in shards)
        self._replaced = {shard.name: shard.before for shard in shards if shard.before}
        self._complete: CompleteShard | None = None  # and not being finalized; no row is taken
        self._finalizing: dict[Any, str] = {}
        # Made once: Ray publishes each to the whole cluster, for good.
        self._finalize = ray.remote(num_cpus=0)(finalize_stage)
        self._metrics = RunMetrics(
            RaySink(settings.replica.parts.run),
            len(shards),
            settings.tile_flop,
            settings.replica.dtype,
            peak_flops,
            living_replicas,
        )
        self._rows: queue.Queue[Part | Exception | None] = queue.Queue(maxsize=1000)
        Interruption.stop = stop
        self._dataset = build_dataset(shards, settings)

    def run(self, tick: Callable[[Tally], None]) -> None:
        consumer = threading.Thread(target=self._consume, name="ray-data", daemon=True)
        consumer.start()
        try:
            ended = False
            while not ended or self._complete is not None:
                if self._complete is None:
                    with suppress(queue.Empty):
                        ended = not self._take(self._rows.get(timeout=TICK_SECONDS))
                    self._collect(timeout=0)
                else:  # as many are being finalized as may be at once
                    self._collect(timeout=TICK_SECONDS)
                self._begin_finalizing()
                tick(self._tally)
                self._metrics.tick()
        except Exception:
            self._stop.set()
            while consumer.is_alive():  # it may wait for room in the queue
                with suppress(queue.Empty):
                    self._rows.get(timeout=TICK_SECONDS)
            raise
        consumer.join()
        while self._finalizing:
            self._collect(timeout=TICK_SECONDS)
            tick(self._tally)
            self._metrics.tick()
        if not self._stop.is_set():
            for name in self._ledger.incomplete():
                self._fail(name, "some of its chunks never came; run the job again")
        self._metrics.flush()

    def _consume(self) -> None:
        """Runs in its own thread: Ray's iterator blocks, and ticks must go on meanwhile."""
        try:
            for row in self._dataset.iter_rows():
                self._rows.put(Part.load(row["part"]))
            self._rows.put(None)
        except FlowStopped:
            self._rows.put(None)
        except Exception as error:  # noqa: BLE001 raised again in the main thread
            self._rows.put(error)

    def _take(self, item: Part | Exception | None) -> bool:
        """Books one row; False when it was the last."""
        if item is None:
            return False
        if isinstance(item, Exception):
            raise item
        self._tally.tiles += item.tiles
        self._tally.reused += item.reused
        self._tally.rejects.update(item.rejects)
        complete = self._ledger.add(item)
        self._metrics.part(item)
        if complete is not None:
            self._metrics.shard(complete)
            self._finish(complete)
        return True

    def _finish(self, shard: CompleteShard) -> None:
        failure = shard.failure or _too_many_rejects(shard, self._settings.max_reject_rate)
        if failure is not None:
            self._fail(shard.name, failure)
        else:
            self._complete = shard

    def _begin_finalizing(self) -> None:
        """Starts the task of the complete shard, if there is one and there is room for it."""
        shard = self._complete
        if shard is None or len(self._finalizing) >= self._settings.num_io_tasks:
            return
        self._complete = None
        try:
            self._assure()
        except OSError as error:
            self._fail(shard.name, f"the run cannot make sure that the output is its own: {error}")
            return
        replaced = self._replaced.get(shard.name, "")
        task = self._finalize.remote(shard, self._settings.finalize, replaced)
        self._finalizing[task] = shard.name

    def _collect(self, timeout: float) -> None:
        if not self._finalizing:
            return
        done, _ = ray.wait(list(self._finalizing), num_returns=1, timeout=timeout)
        for reference in done:
            name = self._finalizing.pop(reference)
            try:
                commit = Commit.parse(ray.get(reference), name)
            except (OSError, UserError, RayError) as error:  # the task's own type, or Ray's
                self._fail(name, str(error).splitlines()[-1])
                continue
            self._metrics.committed(commit)
            self._tally.committed += 1
            self._tally.samples += commit.samples

    def _fail(self, name: str, reason: str) -> None:
        logger.error("shard %s is not committed: %s", name, reason)
        self._metrics.failed(name)
        self._tally.failures.append(Failure(shard=name, reason=reason))
        if REFUSED in reason and not self._stop.is_set():
            logger.error(
                "the storage refuses the credentials, so every other shard would fail too: the run "
                "stops; renew them and run it again"
            )
            self._stop.set()


def _too_many_rejects(shard: CompleteShard, limit: float) -> str | None:
    count = shard.rejects.total()
    if not count or count <= limit * shard.end.samples:
        return None
    codes = ", ".join(f"{code} {times}" for code, times in shard.rejects.most_common(3))
    return (
        f"{count} of {shard.end.samples} samples were rejected ({codes}), "
        f"more than max_reject_rate {limit:g} allows"
    )


def feed_blocks(shards: Sequence[Shard]) -> list[pa.Table]:
    """The input as Ray Data holds it: few blocks, each of many shards."""
    runs = [shards[start : start + FEED_SHARDS] for start in range(0, len(shards), FEED_SHARDS)]
    return [
        pa.table(
            {
                "url": [shard.url for shard in run],
                "name": [shard.name for shard in run],
                "before": [shard.before for shard in run],
            }
        )
        for run in runs
    ]


def build_dataset(shards: Sequence[Shard], settings: FlowSettings) -> Dataset:
    """The plan: stages of different resources, so that Ray keeps them apart."""
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [Interruption, DropBlockStats]
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, QueueLimit]
    )
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=settings.buffer_bytes
    )

    smallest, largest = settings.replicas
    on_gpu = settings.replica.device == "cuda"
    # Without num_cpus Ray Data books a CPU for each replica, and a pool does not grow while tiling
    # holds them all.
    resources: dict[str, float] = (
        {"num_gpus": settings.replica.tensor_parallel, "num_cpus": 0}
        if on_gpu
        else {"num_cpus": CPU_REPLICA_CPUS}
    )
    deaths = remember_deaths()
    return (
        ray.data.from_arrow(feed_blocks(shards))
        .map_batches(
            feed_stage,
            batch_size=None,  # the whole block
            num_cpus=0,
            compute=TaskPoolStrategy(size=1),
        )
        .map_batches(
            read_stage,
            batch_size=1,
            fn_kwargs={"settings": settings.read, "output": settings.finalize},
            num_cpus=IO_CPUS,
            compute=TaskPoolStrategy(size=settings.num_io_tasks),
        )
        .map_batches(
            tile_stage,
            batch_size=1,
            fn_kwargs={"settings": settings.tile, "attempts": ActorAttempts(deaths)},
            num_cpus=TILE_CPUS,
            compute=TaskPoolStrategy(size=settings.num_tile_tasks),
            runtime_env=TILE_WORKERS,
        )
        .map_batches(
            Replica,
            batch_size=1,
            fn_constructor_args=(settings.replica, deaths),
            compute=ActorPoolStrategy(min_size=smallest, max_size=largest),
            **resources,
        )
        .map_batches(
            write_stage,
            batch_size=1,
            fn_kwargs={"settings": settings.finalize},
            num_cpus=IO_CPUS,
            compute=TaskPoolStrategy(size=settings.num_io_tasks),
        )
    )
