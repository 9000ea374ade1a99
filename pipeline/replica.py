"""One whole model behind Ray Data's `embed` stage.

A replica is an actor with `num_gpus` = its tensor-parallel size; it loads the model once and turns
chunks into embeddings. An error of the encoder ends the process: Ray starts it again and gives it
the chunk once more, where a raised exception would end the whole job. A chunk during which replicas
died three times becomes rejects, so that one poisonous picture is no crash loop.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import ray
from ray.actor import ActorHandle

from model.checkpoint import open_checkpoint, weights_digest
from model.errors import CheckpointError
from pipeline.chunks import Chunk
from pipeline.embedding import PartSettings, embed_chunk, reject_chunk
from pipeline.records import Row

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
EXIT_ENCODER_FAILED = 70


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica loads, and how it computes. `revision` and `weights_digest` are resolved;
    `cpu_sharers` replicas share a machine's cores where there is no GPU.
    """

    model: str
    revision: str | None
    weights_digest: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float32"]
    attention: str
    layer: int
    batch_tiles: int | None
    parts: PartSettings
    cpu_sharers: int = 1


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


class Replica:
    """Ray Data calls it with one row, one chunk, at a time."""

    def __init__(self, settings: ReplicaSettings, deaths: ActorHandle) -> None:
        import torch  # not for the driver, which imports this module

        from model.encoder import Encoder

        checkpoint = open_checkpoint(settings.model, settings.revision)
        if (found := weights_digest(checkpoint)) != settings.weights_digest:
            raise CheckpointError(
                f"{settings.model}: the weights on node {ray.util.get_node_ip_address()} differ "
                f"from the driver's ({found[:12]}, {settings.weights_digest[:12]}); copy them anew"
            )
        if settings.device == "cpu":  # Ray sets one thread for an actor of less than two CPUs
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.cpu_sharers))
        self._parts = settings.parts
        self._deaths = deaths
        self._encoder = Encoder.load(
            checkpoint,
            dtype=settings.dtype,
            device=settings.device,
            layer=settings.layer,
            features=tuple(settings.parts.features),
            attention=settings.attention,
            batch_tiles=settings.batch_tiles,
        )

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
                embedded = embed_chunk(chunk, self._encoder.encode, self._parts)
            except Exception:
                logger.exception(
                    "chunk %s: the encoder failed; this replica starts again", chunk_id
                )
                logging.shutdown()
                os._exit(EXIT_ENCODER_FAILED)
        self._deaths.finish.remote(chunk_id)
        return embedded.dump()
