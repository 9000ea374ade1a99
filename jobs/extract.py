"""`tessera extract`: the main job."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from jobs.cluster import Pool, broken_runs_explained, connect, plan_pool
from jobs.config import ExtractConfig, tiling_of
from jobs.local_ray import own_sigterm
from jobs.progress import Reporter
from model.checkpoint import Checkpoint, open_checkpoint, weights_digest
from model.config import count_blocks
from model.feature_shapes import feature_shape
from model.split import check_ranks
from model.work import tile_flop
from pipeline.chunks import CHUNK_BYTES, TileSettings, chunk_tiles
from pipeline.commits import (
    COMMITS,
    RUNS,
    Dataset,
    Failure,
    check_output,
    open_output,
)
from pipeline.dataflow import FlowSettings, Tally, run_shards
from pipeline.embedding import PartSettings
from pipeline.generations import PUBLISHED
from pipeline.layout import layout_of
from pipeline.lease import Lease, held
from pipeline.records import Shape, Shard
from pipeline.replica import ReplicaSettings
from pipeline.respelled import refuse_respelled
from pipeline.samples import ReadSettings
from pipeline.shards import list_shards, probe_shards
from pipeline.stock import run_folders, take_stock
from pipeline.storage import Storage, explained, join, redact, shared
from pipeline.tiling import Tiling
from pipeline.versions import refuse_other_version
from pipeline.writers import FinalizeSettings

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Summary:
    """What a run did. `interrupted` is the signal that stopped it; `reused` of the tiles were taken
    over from older commits."""

    shards: int
    committed_before: int
    committed: int
    samples: int
    tiles: int
    rejects: dict[str, int]
    failures: tuple[Failure, ...]
    seconds: float
    interrupted: int | None = None
    reused: int = 0

    @property
    def exit_status(self) -> int:
        if self.interrupted is not None:
            return 128 + self.interrupted
        return 1 if self.failures else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "committed_before": self.committed_before,
            "committed": self.committed,
            "samples": self.samples,
            "tiles": self.tiles,
            "rejects": self.rejects,
            "failures": {failure.shard: failure.reason for failure in self.failures},
            "seconds": round(self.seconds, 2),
            "tiles_per_second": round(self.tiles / self.seconds, 2) if self.seconds else 0.0,
            "interrupted": self.interrupted is not None,
        }


def extract(config: ExtractConfig, local_cluster: bool = False) -> Summary:
    """Computes and commits every shard of INPUT that OUTPUT does not have yet.

    Raises:
        UserError: the request cannot be met; nothing was started.
    """
    request = prepare(config)
    config, storage, shards = request.config, request.storage, request.shards
    refuse_other_version(config.output, storage)
    check_output(config.output, request.dataset, storage)
    run = run_name()
    with held(config.output, run, storage) as lease:
        committed = open_and_clean(request)
        pending = [shard for shard in shards if shard.name not in committed]
        if not pending:
            return Summary(len(shards), len(shards), 0, 0, 0, {}, (), 0.0)
        others = committed - {shard.name for shard in shards}
        with explained("read", config.output):
            refuse_respelled(config.output, pending, others, storage)
        return run_job(Job(request, run, lease), pending, local_cluster)


@dataclass(frozen=True)
class Request:
    """What was asked for, looked up: the checkpoint, what it makes, and INPUT's shards."""

    config: ExtractConfig
    storage: Storage
    checkpoint: Checkpoint
    dataset: Dataset
    shards: Sequence[Shard]


def prepare(config: ExtractConfig) -> Request:
    """Opens the checkpoint and lists INPUT; OUTPUT is not looked at.

    Raises:
        UserError: one of them cannot be had.
    """
    config = config.model_copy(
        update={
            "output": shared(config.output),
            "model": shared(config.model) if Path(config.model).is_dir() else config.model,
        }
    )
    storage = Storage(config.storage_options, config.deadline_seconds)
    checkpoint = open_checkpoint(config.model, config.revision)
    dataset = describe(config, checkpoint)
    shards = list_shards(config.input, storage)
    probe_shards(shards, storage)
    return Request(config, storage, checkpoint, dataset, shards)


def run_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def open_and_clean(request: Request) -> set[str]:
    """Makes OUTPUT what this run needs, removes what dead ones left; gives what is committed.

    Raises:
        UserError: OUTPUT was made with another fingerprint, or cannot be used.
    """
    output, storage = request.config.output, request.storage
    open_output(output, request.dataset, storage)
    with explained("list", output):
        names = [shard.name for shard in request.shards]
        stock = take_stock(output, names, storage, layout_of(request.dataset))
        storage.remove(*(join(output, name) for name in stock.strays))
    return stock.committed


@dataclass(frozen=True)
class Job:
    """What one run works with; OUTPUT is held by its lease. `above`: OUTPUT's own lease, where a
    version below it is worked on."""

    request: Request
    run: str
    lease: Lease
    above: Lease | None = None

    def check(self) -> None:
        """Raises LeaseLostError where the loss of a lease is known already."""
        for lease in filter(None, (self.above, self.lease)):
            lease.check()

    def assure(self) -> None:
        """Makes sure that OUTPUT is still this run's; see `Lease.assure`."""
        for lease in filter(None, (self.above, self.lease)):
            lease.assure()


def run_job(job: Job, pending: Sequence[Shard], local_cluster: bool) -> Summary:
    """Computes and commits the pending shards on Ray."""
    request, run = job.request, job.run
    config, storage, shards = request.config, request.storage, request.shards
    with (
        Reporter(config.output, run, storage) as reporter,
        stop_on_signal() as stop,
        redirect_stdout(sys.stderr),  # Ray prints what workers say; stdout is for the result alone
    ):
        with own_sigterm():
            started_here = connect(local_cluster)
        stop.listen()

        def tick(tally: Tally) -> None:
            job.check()
            reporter.tick(tally)

        try:
            pool = plan_pool(config.tensor_parallel, config.replicas, config.dtype, started_here)
            settings = flow_settings(
                config, request.checkpoint, request.dataset, pool, storage, run, job.lease.number
            )
            with broken_runs_explained():
                tally = run_shards(pending, settings, tick, stop.event, job.assure)
        finally:
            ray.shutdown()
            if job.lease.is_lost:  # its successor has cleaned up already, and may be gone
                with left_to_the_next_run(config.output):
                    storage.remove(join(config.output, RUNS, run))
        with left_to_the_next_run(config.output):
            finish_run(config.output, run, reporter, tally, storage, stop.signum)
        return Summary(
            len(shards),
            len(shards) - len(pending),
            tally.committed,
            tally.samples,
            tally.tiles,
            dict(tally.rejects),
            tuple(tally.failures),
            reporter.seconds(),
            stop.signum,
            tally.reused,
        )


def describe(config: ExtractConfig, checkpoint: Checkpoint) -> Dataset:
    """What decides the output's values and columns; see `Dataset`."""
    num_blocks = count_blocks(checkpoint.config, config.layer)
    check_ranks(checkpoint.config, config.tensor_parallel)
    preprocessor = checkpoint.preprocessor
    dynamic = {
        "max_tiles": config.max_tiles,
        "thumbnail": config.thumbnail,
        "max_upscale": config.max_upscale,
    }
    settings: dict[str, Any] = {
        "tiling": config.tiling,
        **(dynamic if config.tiling == "dynamic" else {"resize_to": preprocessor.resize_to}),
        "tile_size": preprocessor.crop,
        "mean": preprocessor.mean,
        "std": preprocessor.std,
        "resize": config.resize,
        "layer": num_blocks - 1,
        "format": config.format,
        "embedding_dtype": config.embedding_dtype,
        "dtype": config.dtype,
        "image_key": config.image_key,
        "carry": config.carry,
    }
    return Dataset.describe(
        model=config.model,
        revision=checkpoint.revision,
        weights_digest=weights_digest(checkpoint),
        settings=settings,
        features={
            name: feature_shape(name, checkpoint.config, preprocessor.crop)
            for name in config.features
        },
        version=version("tessera"),
    )


def flow_settings(
    config: ExtractConfig,
    checkpoint: Checkpoint,
    dataset: Dataset,
    pool: Pool,
    storage: Storage,
    run: str,
    lease: int | None = None,
) -> FlowSettings:
    preprocessor = checkpoint.preprocessor
    parts = PartSettings(
        storage,
        config.output,
        run,
        dataset.features,
        config.embedding_dtype,
        config.carry,
        config.format,
    )
    tiling = tiling_of(config, preprocessor.crop, preprocessor.resize_to)
    tile_bytes = parts.layout.tile_bytes
    return FlowSettings(
        read=ReadSettings(
            storage,
            config.image_key,
            config.carry,
            config.accept_truncated,
            replaced_samples(tiling, dataset.features, tile_bytes, pool.device),
        ),
        tile=TileSettings(
            tiling,
            config.carry,
            config.deadline_seconds,
            chunk_tiles(pool.chunk_tiles, tile_bytes, pool.device),
        ),
        replica=ReplicaSettings(
            model=config.model,
            revision=checkpoint.revision,
            weights_digest=dataset.weights_digest,
            device=pool.device,
            dtype=config.dtype,
            attention=config.attention,
            layer=config.layer,
            batch_tiles=config.batch_tiles,
            parts=parts,
            tensor_parallel=config.tensor_parallel,
            cpu_sharers=pool.replicas[1],
        ),
        finalize=FinalizeSettings(parts, dataset.fingerprint, int(config.target_part_bytes), lease),
        replicas=pool.replicas,
        num_io_tasks=pool.num_io_tasks,
        num_tile_tasks=pool.num_tile_tasks,
        max_reject_rate=config.max_reject_rate,
        buffer_bytes=pool.buffer_bytes,
        tile_flop=tile_flop(checkpoint.config, count_blocks(checkpoint.config, config.layer)),
    )


def replaced_samples(
    tiling: Tiling, features: Mapping[str, Shape], tile_bytes: int, device: str
) -> int | None:
    """See `ReadSettings`. Only tokens are so large that it matters."""
    if all(isinstance(shape, int) for shape in features.values()):
        return None
    most_tiles = tiling.max_tiles + tiling.thumbnail if tiling.mode == "dynamic" else 1
    return max(1, CHUNK_BYTES[device] // (most_tiles * tile_bytes))


@contextmanager
def left_to_the_next_run(output: str) -> Iterator[None]:
    """What cannot be removed now is no reason to keep quiet about what was done."""
    try:
        yield
    except OSError as error:
        logger.warning(
            "%s: what this run needed for itself is not removed (%s); the next run does that",
            redact(output), error,
        )  # fmt: skip


def finish_run(
    output: str,
    run: str,
    reporter: Reporter,
    tally: Tally,
    storage: Storage,
    interrupted: int | None,
) -> None:
    """Leaves nothing of a run that ended well, else the record of what is missing."""
    if tally.failures or interrupted is not None:
        storage.remove(join(output, RUNS, run, "parts"))
        reporter.record(tally, ended=True)
    else:
        runs = run_folders(output, storage)  # this one's, and what tasks of a dead one wrote late
        storage.remove(*(join(output, folder) for folder in runs))
        for folder in (COMMITS, *PUBLISHED):
            storage.remove_temporaries(join(output, folder))


class Stop:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signum: int | None = None
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.listen()

    def listen(self) -> None:
        """Again once Ray has started: its native code puts a handler of SIGTERM before ours that
        aborts the process three seconds later, whatever it is at."""
        if self.event.is_set():
            return
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        signal.alarm(0)  # by which Ray's native handler, were it called first, would abort
        self.signum = signum
        self.event.set()
        self.restore()


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    stop = Stop()
    try:
        yield stop
    finally:
        stop.restore()
