"""One whole model behind Ray Data's `embed` stage.

A replica is an actor with `num_gpus` = its tensor-parallel size; it loads the model once and turns
chunks into embeddings. Split over several GPUs, the actor is rank 0 and starts the other ranks on
its node; they live and die with it. An error of the encoder ends the process: Ray starts it again
and gives it the chunk once more, where a raised exception would end the whole job. A chunk during
which replicas died three times becomes rejects, so that one poisonous picture is no crash loop.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import ray
from ray._private.state import actors
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model.checkpoint import open_checkpoint, weights_digest
from model.errors import CheckpointError
from pipeline.chunks import Chunk
from pipeline.cpus import usable_cpus
from pipeline.embedding import PartSettings, embed_chunk, reject_chunk
from pipeline.endings import EXIT_SECONDS, end_for_sure
from pipeline.records import Compute, Row, Work

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
EXIT_ENCODER_FAILED = 70


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica loads, and how it computes. `revision` and `weights_digest` are resolved;
    `cpu_sharers` replicas share a machine's cores where there is no GPU; ranks that make no
    progress for `hang_seconds` are ended.
    """

    model: str
    revision: str | None
    weights_digest: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32", "fp8"]
    attention: str
    layer: int
    batch_tiles: int | None
    parts: PartSettings
    tensor_parallel: int = 1
    cpu_sharers: int = 1
    hang_seconds: float = 120.0


class Deaths:
    """Remembers, beyond the life of a replica, which chunks were begun and not finished."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, chunk_id: str) -> int:
        """Counts an attempt; gives the number of earlier ones that did not come to an end."""
        self._begun[chunk_id] += 1
        return self._begun[chunk_id] - 1

    def finish(self, chunk_id: str) -> None:
        del self._begun[chunk_id]


def remember_deaths() -> ActorHandle:
    """Starts a `Deaths` that lives as long as the driver: on its node, and again when it dies.

    Anywhere else every replica would fail with the node it happened to be on. One that starts again
    has forgotten its counts, which only gives a chunk more attempts.
    """
    beside_driver = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return (
        ray.remote(Deaths)
        .options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside_driver
        )
        .remote()
    )


def replica_name(actor_id: str, pid: int) -> str:
    """With the process: one that starts again is the same actor to Ray."""
    return f"{actor_id[:8]}-{pid}"


def living_replicas() -> set[str]:
    """Names of this job's actors that are alive, as its head knows them; needs no dashboard."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    alive = actors(job_id=job, actor_state_name="ALIVE")
    return {replica_name(actor_id, actor["Pid"]) for actor_id, actor in alive.items()}


class Replica:
    """Ray Data calls it with one row, one chunk, at a time.

    `exit_seconds`: see `end_for_sure`.
    """

    exit_seconds: ClassVar[int] = EXIT_SECONDS

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        import torch  # not for the driver, which imports this module

        from model.encoder import Encoder
        from model.ranks import ParallelEncoder

        end_for_sure(self.exit_seconds)
        checkpoint = open_checkpoint(settings.model, settings.revision)
        if (found := weights_digest(checkpoint)) != settings.weights_digest:
            raise CheckpointError(
                f"{settings.model}: the weights on node {ray.util.get_node_ip_address()} differ "
                f"from the driver's ({found[:12]}, {settings.weights_digest[:12]}); copy them anew"
            )
        self._parts = settings.parts
        self._deaths = deaths
        self._settings = settings
        # Ray sets one thread for an actor of less than two CPUs.
        sharers = settings.cpu_sharers * settings.tensor_parallel
        threads = max(1, usable_cpus() // sharers)
        how: dict[str, Any] = {
            "dtype": settings.dtype,
            "device": settings.device,
            "layer": settings.layer,
            "features": tuple(settings.parts.features),
            "embedding_dtype": settings.parts.embedding_dtype,
            "attention": settings.attention,
            "batch_tiles": settings.batch_tiles,
        }
        self._encoder: Encoder | ParallelEncoder
        if settings.tensor_parallel == 1:
            torch.set_num_threads(threads)
            self._encoder = Encoder.load(checkpoint, **how)
        else:
            self._encoder = ParallelEncoder(
                checkpoint,
                settings.tensor_parallel,
                threads=threads,
                hang_seconds=settings.hang_seconds,
                **how,
            )
        self._device = "cpu" if settings.device == "cpu" else torch.cuda.get_device_name()
        context = ray.get_runtime_context()
        self._name = replica_name(context.get_actor_id(), os.getpid())
        self._node = ray.util.get_node_ip_address()
        self._idle_since = time.perf_counter()

    def __call__(self, row: Row) -> Row:
        chunk = Chunk.load(row)
        chunk_id = chunk.head.chunk_id
        deaths = ray.get(self._deaths.begin.remote(chunk_id))
        if deaths >= MAX_DEATHS:
            logger.error("chunk %s: given up after %d deaths of a replica", chunk_id, deaths)
            message = f"{deaths} replicas died while they computed this chunk"
            embedded = reject_chunk(chunk, self._parts, message)
        else:
            try:
                began = time.perf_counter()
                embedded = embed_chunk(chunk, self._encoder.encode, self._parts)
                work = self._work(len(chunk.tiles), began)
                if len(chunk.tiles) or chunk.known is None:
                    head = replace(embedded.head, compute=self._compute(), work=work)
                    embedded = replace(embedded, head=head)
            except Exception:
                logger.exception(
                    "chunk %s: the encoder failed; this replica starts again", chunk_id
                )
                logging.shutdown()
                os._exit(EXIT_ENCODER_FAILED)
        self._deaths.finish.remote(chunk_id)
        return replace(embedded, head=replace(embedded.head, embed_deaths=deaths)).dump()

    def _work(self, tiles: int, began: float) -> Work:
        """Called when a chunk is done; from then on the replica waits for the next."""
        starved, self._idle_since = began - self._idle_since, time.perf_counter()
        return Work(self._node, self._name, tiles, self._idle_since - began, starved)

    def _compute(self) -> Compute:
        """`batch_tiles` may change while a replica lives, when memory runs out."""
        return Compute(
            self._device,
            self._settings.tensor_parallel,
            self._encoder.attention.name,
            self._encoder.batch_tiles,
        )
