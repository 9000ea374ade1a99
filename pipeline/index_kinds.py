"""The kinds of index: which for how many vectors, what it takes, and how FAISS makes it."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from model.errors import UserError
from pipeline.index_record import Flat, Hnsw, IvfPq, Kind, Parameters

# Chosen; what a kind takes and finds is measured by `benchmarks.vector_index --kind`.
MOST_VECTORS: dict[Kind, int] = {"flat": 20_000, "hnsw": 100_000}
STAYS_FACTOR = 2  # an index keeps its kind up to so many times that, or a share of that
HNSW = Hnsw(links=32, build_breadth=100, search_breadth=128)
DIMENSIONS = 256
CODE_BITS = 4
FEWEST_TRAINED = 1 << CODE_BITS  # vectors: one a code
PROBES = 32
CANDIDATES = 100
FEW = 10  # neighbours, for which so many lists and candidates do
POINTS_A_LIST = 40  # FAISS asks for 39
SMALLEST_SAMPLE = 10_000
SAMPLE_BYTES = 320 << 20  # of vectors in float16
SEGMENT_BYTES = 256 << 20  # of what is stored of a segment's vectors

# Peaks of a process that calls `build_segment`: all formats and kinds, to 80,000 vectors of 3200.
PROCESS_BYTES = 448 << 20  # Python with Arrow and FAISS, and what is read: 445 MiB at most
WORKER_BYTES = 64 << 20  # of Ray's process more than of our own: 46 MiB

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def kind_for(vectors: int, before: Kind | None = None) -> Kind:
    """The kind for so many vectors; `before`, where that many are still near its range."""
    found = _kind_for(vectors)
    if before is not None and before in {
        _kind_for(vectors // STAYS_FACTOR),
        _kind_for(vectors * STAYS_FACTOR),
    }:
        return before
    return found


def _kind_for(vectors: int) -> Kind:
    return next((kind for kind, most in MOST_VECTORS.items() if vectors <= most), "ivf-pq")


def choose(kind: Kind, vectors: int, width: int) -> Parameters:
    """The parameters for `vectors` vectors [width].

    Raises:
        UserError: they are too few to train on.
    """
    if kind == "flat":
        return Flat()
    if kind == "hnsw":
        return HNSW
    if vectors < FEWEST_TRAINED:
        raise UserError(
            f"kind ivf-pq is trained on at least {FEWEST_TRAINED} vectors, there are {vectors}; "
            "choose flat"
        )
    lists = max(1, round(math.sqrt(vectors)))
    sample = min(vectors, max(POINTS_A_LIST * lists, SMALLEST_SAMPLE), SAMPLE_BYTES // (2 * width))
    return IvfPq(
        dimensions=max(2, min(DIMENSIONS, width // 2 * 2)),
        lists=min(lists, sample),
        probes=PROBES,
        candidates=CANDIDATES,
        sample=sample,
    )


def vector_bytes(parameters: Parameters, width: int) -> int:
    """What a segment stores of one vector."""
    if isinstance(parameters, Flat):
        return 4 * width
    if isinstance(parameters, Hnsw):
        return 2 * width + 4 * 2 * parameters.links + 8
    return width + parameters.dimensions * CODE_BITS // 16 + 8


def segment_vectors(parameters: Parameters, width: int) -> int:
    """The most vectors of a segment of several shards."""
    return SEGMENT_BYTES // vector_bytes(parameters, width)


def training_bytes(parameters: Parameters, width: int) -> int:
    """Memory that training takes."""
    if not isinstance(parameters, IvfPq):
        return PROCESS_BYTES
    sample = parameters.sample * (2 * width + 3 * 4 * parameters.dimensions)
    axes = 4 * 4 * width * width
    return PROCESS_BYTES + sample + axes + 2 * SQ_SAMPLE * 4 * width


def task_bytes(parameters: Parameters, width: int, vectors: int) -> int:
    """Memory that the building of a segment of so many vectors takes, captions of some hundred
    characters among it."""
    held = vectors * vector_bytes(parameters, width)
    return PROCESS_BYTES + WORKER_BYTES + held * 5 // 4


SQ_SAMPLE = 8192  # vectors: the range of each dimension is taken from them
SQ_MARGIN = 0.1  # beyond it on either side, as a share of it
ITERATIONS = 10


def empty_index(parameters: Parameters, width: int) -> faiss.Index:
    """An index that is not trained, or needs no training."""
    if isinstance(parameters, Flat):
        return faiss.IndexFlatIP(width)
    if isinstance(parameters, Hnsw):
        index = faiss.IndexHNSWSQ(
            width, faiss.ScalarQuantizer.QT_fp16, parameters.links, faiss.METRIC_INNER_PRODUCT
        )
        index.is_trained = True  # float16 has nothing to learn
        index.hnsw.efConstruction = parameters.build_breadth
        return index
    raise AssertionError("made by `trained_index`")


def trained_index(parameters: IvfPq, axes: Floats, reduced: Floats, whole: Floats) -> faiss.Index:
    """Trains an index.

    Args:
        axes: [dimensions, D], orthonormal; reduced: the sample [n, dimensions] along them; whole:
            some of the sample [m, D]. On vectors of length 1 the Euclidean distance, which product
            codes are made for, orders as the cosine does.
    """
    dimensions, width = axes.shape
    turn = faiss.LinearTransform(width, dimensions, False)
    faiss.copy_array_to_vector(axes.ravel(), turn.A)
    turn.is_trained = True
    turn.set_is_orthonormal()
    lists = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatL2(dimensions), dimensions, parameters.lists, dimensions // 2, CODE_BITS
    )
    for clustering in (lists.cp, lists.pq.cp):
        clustering.niter = ITERATIONS
        clustering.min_points_per_centroid = 1  # else it writes to stderr where there are few
    lists.train(reduced)
    whole_codes = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit)
    whole_codes.sq.rangestat_arg = SQ_MARGIN
    whole_codes.train(whole)
    index = faiss.IndexRefine(faiss.IndexPreTransform(turn, lists), whole_codes)
    index.is_trained = True
    return index


def reserve(index: faiss.Index, vectors: int) -> None:
    """Makes room for so many in an empty index: FAISS doubles what is full, and copies."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexRefine):
        inner = faiss.downcast_index(inner.refine_index)
    elif isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    inner.codes.resize(vectors * inner.code_size)
    inner.codes.resize(0)


def search_parameters(
    parameters: Parameters, count: int, selector: faiss.IDSelector | None
) -> faiss.SearchParameters:
    """How an index of this kind is searched for `count` neighbours among those selected.

    Of product codes, the candidates grow with the count, ten for each, and the lists with its root:
    so recall is not lower where more are asked (docs/indexing.md).
    """
    chosen: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(parameters, Flat):
        return faiss.SearchParameters(**chosen)
    if isinstance(parameters, Hnsw):
        return faiss.SearchParametersHNSW(efSearch=max(parameters.search_breadth, count), **chosen)
    few = min(count, FEW)
    probes = math.ceil(parameters.probes * math.sqrt(count / few))
    lists = faiss.SearchParametersIVF(nprobe=probes, **chosen)
    return faiss.IndexRefineSearchParameters(
        k_factor=max(1.0, parameters.candidates / few),
        base_index_params=faiss.SearchParametersPreTransform(index_params=lists),
    )


def similarities(parameters: Parameters, found: Floats) -> Floats:
    """Cosines of what FAISS gives: those, or squared distances of vectors of length 1."""
    return np.float32(1) - found / np.float32(2) if isinstance(parameters, IvfPq) else found
