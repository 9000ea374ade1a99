"""The model of an index: what its segments share. Trained once, on a sample of the commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.index_files import publish_faiss, publish_table, read_table
from pipeline.index_kinds import SQ_SAMPLE, trained_index
from pipeline.index_record import (
    INDEX_SCHEMA_VERSION,
    IvfPq,
    Model,
    Parameters,
    digest,
    model_path,
    read_whole,
)
from pipeline.index_sample import (
    SEED,
    PlannedShard,
    Sample,
    VectorSource,
    sample_places,
    take_sample,
)
from pipeline.storage import Storage, join
from pipeline.unit_vectors import normalized

Floats = npt.NDArray[np.float32]
QUERIES = 100
SLICE = 4096  # vectors that are worked on at once
AXES_SAMPLE = 16_384  # vectors, five times the widest there are
SPARE_AXES = 64
ROUNDS = 8


@dataclass(frozen=True)
class Queries:
    """Unit vectors [q, D] that recall is measured with, and whose they are."""

    vectors: Floats
    pictures: list[tuple[str, int]]  # shard, sample_index


def make_model(
    index: str,
    source: VectorSource,
    parameters: Parameters,
    shards: Sequence[PlannedShard],
    storage: Storage,
) -> Model:
    """Samples, trains and publishes; or finds what an earlier run has published.

    Raises:
        OutputChangedError: a shard is no longer what was planned with.
    """
    wanted = max(QUERIES, parameters.sample if isinstance(parameters, IvfPq) else 0)
    name = model_name(source, parameters, shards, wanted)
    path = model_path(name)
    found = read_whole(Model, index, path, storage)
    if found is not None:
        return found
    sample = take_sample(source, shards, wanted)
    trained = None
    if isinstance(parameters, IvfPq):
        trained = publish_faiss(index, f"{path}.faiss", train(parameters, sample), storage)
    queries = publish_table(index, f"{path}.queries.parquet", queries_of(sample), storage)
    model = Model(name=name, trained=trained, queries=queries)
    storage.publish_bytes(join(index, model.json_path), model.dump())
    return model


def model_name(
    source: VectorSource, parameters: Parameters, shards: Sequence[PlannedShard], wanted: int
) -> str:
    sampled = [shard.commit for shard in sample_places(shards, wanted)]
    text = parameters.model_dump_json()
    made_so = (str(INDEX_SCHEMA_VERSION), str(SEED), str(wanted), text)
    return digest(*made_so, source.feature, source.choice, *sampled)


def queries_of(sample: Sample) -> pa.Table:
    rng = np.random.default_rng(SEED)
    rows = np.sort(rng.permutation(len(sample.shards))[:QUERIES])
    values = pa.array(sample.vectors[rows].astype(np.float32).ravel())
    return pa.table(
        {
            "shard": [sample.shards[row] for row in rows],
            "sample_index": sample.sample_indices[rows],
            "vector": pa.FixedSizeListArray.from_arrays(values, sample.vectors.shape[1]),
        }
    )


def read_queries(index: str, model: Model, storage: Storage) -> Queries:
    table = read_table(index, model.queries, storage)
    width = table.schema.field("vector").type.list_size
    values = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    pictures = zip(table["shard"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    return Queries(normalized(values), list(pictures))


def train(parameters: IvfPq, sample: Sample) -> faiss.Index:
    """The trained, empty index."""
    order = np.random.default_rng(SEED).permutation(len(sample.vectors))
    axes = principal_axes(sample.vectors[np.sort(order[:AXES_SAMPLE])], parameters.dimensions)
    reduced = np.empty((len(sample.vectors), parameters.dimensions), np.float32)
    for start in range(0, len(reduced), SLICE):
        run = sample.vectors[start : start + SLICE].astype(np.float32)
        reduced[start : start + SLICE] = run @ axes.T
    whole = sample.vectors[np.sort(order[:SQ_SAMPLE])].astype(np.float32)
    return trained_index(parameters, axes, reduced, whole)


def principal_axes(vectors: npt.NDArray[np.float16], count: int) -> Floats:
    """`count` orthonormal directions [count, D] that keep the most of the vectors' squares, turned
    at random among themselves so that each keeps as much as the others.

    By subspace iteration on the matrix of second moments; not centred, as that would change the
    vectors' inner products.
    """
    rng = np.random.default_rng(SEED)
    width = vectors.shape[1]
    moments = np.zeros((width, width), np.float32)
    for start in range(0, len(vectors), SLICE):
        run = vectors[start : start + SLICE].astype(np.float32)
        moments += run.T @ run
    start_axes = rng.standard_normal((width, min(width, count + SPARE_AXES)), np.float32)
    axes = np.linalg.qr(start_axes)[0]
    for _ in range(ROUNDS):
        axes = np.linalg.qr(moments @ axes)[0]
    values, vectors_of = np.linalg.eigh(axes.T @ moments @ axes)
    best = axes @ vectors_of[:, np.argsort(-values)[:count]]
    turn = np.linalg.qr(rng.standard_normal((count, count)))[0].astype(np.float32)
    # once more in float64: FAISS takes them for orthonormal
    turned = np.linalg.qr((best @ turn).astype(np.float64))[0].T
    return np.ascontiguousarray(turned, np.float32)
