"""Embeddings and samples as a torch dataset: the one module of the readers that imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from model.errors import UserError
from pipeline.joined import JoinedSample, joined_shard, sources_of
from pipeline.one_vector import VectorChoice
from pipeline.read import LOCAL, check_choice, one_vector, open_output
from pipeline.storage import Storage


class JoinedDataset(IterableDataset[dict[str, Any]]):
    """`pipeline.joined.joined`, split by rank and by DataLoader worker: each reads whole shards.

    An item is a dict: `shard`, `key`, `sample_index`, `features` (feature → tensor [n, D] of all
    tiles; with `vector` one [D] in float32) and `members` (extension → bytes: all that were asked
    for, b"" for one that the sample does not have; without `members` those that it has).

    Args:
        shards: those to divide (default: all committed ones, as they are listed now). Ranks that
            start while a run is on should be given one list.
        vector: one vector a picture, chosen as `pipeline.read.vectors` says.
        rank, world_size: default: those of `torch.distributed`, where it is initialised.

    Raises:
        UserError: as `joined` does, here or while it is iterated.
    """

    def __init__(
        self,
        output: str,
        storage: Storage = LOCAL,
        *,
        shards: Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        vector: VectorChoice | None = None,
        members: Sequence[str] | None = None,
        inputs: Sequence[str] = (),
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._output = open_output(output, storage)
        self._features = self._output.features(features)
        if vector is not None:
            check_choice(self._output, vector)
            for name in self._features:
                self._output.width(name)
        self._vector = vector
        self._members = None if members is None else tuple(members)
        self._shards = self._output.shards(shards)
        self._sources = sources_of(self._output, self._shards, members, inputs)
        # Workers of a DataLoader have no process group: asked here.
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if grouped else 0
        self._world_size = (
            world_size
            if world_size is not None
            else torch.distributed.get_world_size()
            if grouped
            else 1
        )
        if not 0 <= self._rank < self._world_size:
            raise UserError(
                f"rank {self._rank} of {self._world_size}: give `rank` and `world_size` together"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        first = self._rank * workers + worker
        for name in self._shards[first :: self._world_size * workers]:
            for sample in joined_shard(self._output, name, self._features, self._sources):
                yield self._item(sample)

    def _item(self, sample: JoinedSample) -> dict[str, Any]:
        picture = sample.picture
        values: Mapping[str, np.ndarray[Any, Any]] = picture.features
        if self._vector is not None:
            values = {name: one_vector(picture, name, self._vector) for name in values}
        return {
            "shard": picture.shard,
            "key": picture.key,
            "sample_index": picture.sample_index,
            "features": {name: torch.from_numpy(value.copy()) for name, value in values.items()},
            "members": dict(sample.members)
            if self._members is None
            else {name: sample.members.get(name, b"") for name in self._members},
        }
