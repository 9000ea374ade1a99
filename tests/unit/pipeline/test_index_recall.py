"""Recall of an index: what was found segment by segment is what a search of the whole finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.index import build_index
from pipeline import index_kinds, index_segments, vector_index
from pipeline.commits import Commit
from pipeline.index_models import read_queries
from pipeline.index_record import KINDS, IndexRecord, Kind
from pipeline.unit_vectors import normalized
from pipeline.vector_index import VectorIndex
from tests.stages import STORAGE
from tests.vector_outputs import clustered, drop_shard, put_shard, vector_dataset

WIDTH = 32
DATASET = vector_dataset({"cls": WIDTH})


class Shards:
    """An OUTPUT, its vectors of length 1, and an INDEX of it."""

    def __init__(self, root: Path) -> None:
        self.output, self.index = str(root / "out"), str(root / "index")
        self.commits: dict[str, Commit] = {}
        self.vectors: dict[str, np.ndarray] = {}

    def put(self, name: str, values: np.ndarray) -> None:
        put = put_shard(self.output, DATASET, name, {"cls": values}, STORAGE, group_rows=512)
        self.commits[name] = put
        self.vectors[name] = normalized(values.astype(np.float16))

    def drop(self, name: str) -> None:
        drop_shard(self.output, self.commits.pop(name), STORAGE)
        del self.vectors[name]

    def recall(self, kind: Kind) -> tuple[float, IndexRecord]:
        record = build_index(self.output, self.index, kind=kind).record
        assert record.recall is not None
        return record.recall.value, record

    def searched(self, record: IndexRecord) -> float:
        """Recall by a search of the whole index, and exact cosines with every vector."""
        queries = read_queries(self.index, record.model, STORAGE)
        found = VectorIndex.open(self.index, STORAGE).search(queries.vectors, 11)
        shares = []
        for query, mine, own in zip(queries.vectors, found, queries.pictures, strict=True):
            cosines = {
                (name, n): cosine
                for name, values in self.vectors.items()
                for n, cosine in enumerate((values @ query).tolist())
                if (name, n) != own
            }
            exact = sorted(cosines.values(), reverse=True)[:10]
            others = [(n.shard, n.sample_index) for n in mine]
            others = [place for place in others if place != own][: len(exact)]
            shares.append(sum(cosines[p] >= exact[-1] - 1e-5 for p in others) / len(exact))
        return round(float(np.mean(shares)), 4)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Of several segments, whose numbers of vectors differ, built one after the other."""
    monkeypatch.setattr(index_kinds, "SEGMENT_BYTES", 1100 * 4 * WIDTH)
    monkeypatch.setattr(
        "jobs.index.build_on_ray",
        lambda requests, storage: [index_segments.build_segment(r, storage) for r in requests],
    )
    made = Shards(tmp_path)
    for seed, (name, pictures) in enumerate(zip("abcde", (700, 300, 5, 900, 600), strict=True)):
        made.put(name, clustered(pictures, WIDTH, seed))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_that_of_a_search_of_the_whole(
    shards: Shards, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "flat":  # coarse enough that neighbours are missed
        monkeypatch.setattr(index_kinds, "PROBES", 3)
        monkeypatch.setattr(index_kinds, "CANDIDATES", 12)
        monkeypatch.setattr(index_kinds, "DIMENSIONS", 8)
        hnsw = index_kinds.HNSW.model_copy(update={"links": 4, "search_breadth": 12})
        monkeypatch.setattr(index_kinds, "HNSW", hnsw)
    before, record = shards.recall(kind)
    assert before == shards.searched(record)
    assert (before == 1.0) == (kind == "flat")
    commit = shards.commits["b"]
    shards.drop("b")
    less, record = shards.recall(kind)
    assert any(segment.live_vectors < segment.vectors for segment in record.segments)
    assert less == shards.searched(record)
    shards.put("f", clustered(40, WIDTH, 9))
    more, record = shards.recall(kind)
    assert more == shards.searched(record)
    shards.drop("f")
    shards.put("b", clustered(300, WIDTH, 1))
    assert shards.commits["b"].parts == commit.parts
    again, record = shards.recall(kind)
    assert again == before == shards.searched(record)
    left = {str(p.relative_to(shards.index)) for p in Path(shards.index).rglob("*.*")}
    assert left == record.objects | {"index.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_more_equal_pictures_than_are_kept_count_as_one_another(tmp_path: Path, kind: Kind) -> None:
    made = Shards(tmp_path)
    values = clustered(1500, WIDTH, 3)
    values[::5] = values[0]
    made.put("a", values)
    made.put("b", clustered(900, WIDTH, 4))
    made.put("c", clustered(900, WIDTH, 5))
    built, record = made.recall(kind)
    assert built == made.searched(record)
    assert built >= {"flat": 1.0, "hnsw": 0.9, "ivf-pq": 0.9}[kind]
    made.drop("b")
    assert len(record.segments) == 1
    less, record = made.recall(kind)
    assert record.segments[0].live_vectors == 2400
    assert less == made.searched(record)


@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_alone_take_for_nearer_does_not_count(tmp_path: Path, kind: Kind) -> None:
    """All neighbours are in one shard, and and codes mix them up."""
    made = Shards(tmp_path)
    near = np.ones(WIDTH) + 0.5 * clustered(1500, WIDTH, 3, clusters=1)
    made.put("a", near)
    built, record = made.recall(kind)
    assert made.searched(record) - 0.02 <= built <= made.searched(record)


def test_measuring_opens_no_segment(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of which more has died."""
    shards.recall("flat")
    opened: list[str] = []

    def counted(index: str, file: object, *rest: object, **more: object) -> object:
        opened.append(getattr(file, "path", ""))
        return read(index, file, *rest, **more)  # type: ignore[arg-type]

    read = vector_index.read_faiss
    for module in ("index_recall", "index_segments", "vector_index"):
        monkeypatch.setattr(f"pipeline.{module}.read_faiss", counted)
    shards.put("f", clustered(40, WIDTH, 9))
    shards.recall("flat")
    assert opened == []
    shards.drop("c")
    record = shards.recall("flat")[1]
    assert opened == [s.index.path for s in record.segments if s.live_vectors < s.vectors]
    assert len(opened) == 1
    shards.put("g", clustered(40, WIDTH, 10))
    shards.recall("flat")
    assert len(opened) == 1


@pytest.mark.parametrize("count", [10, 100, 300, 1000, 3000])
def test_more_neighbours_are_as_well_found(tmp_path: Path, count: int) -> None:
    made = Shards(tmp_path)
    made.put("a", clustered(3000, WIDTH, 3))
    build_index(made.output, made.index, kind="ivf-pq")
    queries = normalized(clustered(20, WIDTH, 4))
    found = VectorIndex.open(made.index, STORAGE).search(queries, count)
    exact = np.argsort(-(queries @ made.vectors["a"].T), axis=1)[:, :count]
    shared = []
    for mine, due in zip(found, exact.tolist(), strict=True):
        assert len(mine) == count
        shared.append(len({n.sample_index for n in mine} & set(due)))
    assert np.mean(shared) >= 0.9 * count
