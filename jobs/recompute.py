"""Computes some pictures again with transformers' own model and compares what OUTPUT stores.

The pictures come from the source, are tiled by this project's tiling (it has its own tests against
InternVL's) and go through a network, a naming of weights and a preparation of pixels that share
nothing with the encoder's. The reference computes in float32. What is allowed, for each tile:

| dtype    | embedding_dtype | |
|---|---|---|
| float32  | float32 | relative error ≤ 1e-4: another order of sums |
| float32  | float16 | relative error ≤ 2e-3: float16 rounds each value by up to 5e-4 of it |
| bfloat16, float16 | any | cosine ≥ 0.999: the whole network computes with 8 or 11 bits |
| fp8      | any     | cosine ≥ 0.99: its linear layers compute with 4 bits |

The relative error is |stored - reference| / |reference|, in the 2-norm.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from jobs.recorded import recorded_settings
from model.checkpoint import Checkpoint
from model.reference import load_reference, reference_embeddings
from pipeline.audit_parts import run_starts
from pipeline.commits import Commit, Dataset
from pipeline.formats import part_tables
from pipeline.layout import layout_of
from pipeline.part_copies import PartError
from pipeline.pictures import PictureError, picture_size
from pipeline.records import Shard, num_values
from pipeline.samples import ReadSettings, read_groups
from pipeline.storage import Storage, redact
from pipeline.tiling import Tiling, cut_tiles, plan_tiles
from pipeline.vectors import feature_values

RELATIVE_ERROR = {"float32": 1e-4, "float16": 2e-3}  # by embedding_dtype
COSINE = {"bfloat16": 0.999, "float16": 0.999, "fp8": 0.99}  # by dtype

Features = Mapping[str, npt.NDArray[np.floating[Any]]]  # each [n, D]


@dataclass(frozen=True)
class StoredPicture:
    """The rows of one picture, a tile each, as they lie in a part of OUTPUT."""

    path: str
    sample_index: int
    rows: pa.Table

    def __str__(self) -> str:
        return f"{self.path}: sample {self.sample_index} ({self.rows['key'][0].as_py()})"


@dataclass
class Agreement:
    """How near the stored values came to the reference, over all tiles and features."""

    pictures: int = 0
    tiles: int = 0
    relative_error: float = 0.0
    cosine: float = 1.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.pictures} pictures, {self.tiles} tiles: relative error up to "
            f"{self.relative_error:.1e}, cosine from {self.cosine:.6f}; "
            f"{len(self.problems)} beyond what is allowed"
        )


def recompute_pictures(
    commits: Sequence[Commit],
    dataset: Dataset,
    checkpoint: Checkpoint,
    output: str,
    sources: Mapping[str, Shard],
    storage: Storage,
    number: int,
    seed: int,
) -> Agreement:
    """Compares `number` pictures, drawn over all of `commits`, or all where there are fewer.

    `sources` says where a shard's source is, if not where its commit has it. Raises OSError where
    OUTPUT cannot be read, UserError where its settings lack one; a source that cannot be read is a
    problem of the agreement.
    """
    agreement = Agreement()
    tiling = recorded_settings(dataset, output).as_tiling()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reference(checkpoint, "float32", device)
    for commit, ranks in _choose(commits, number, seed):
        source = sources.get(commit.shard, Shard(commit.source.url, commit.shard))
        stored = _stored_pictures(commit, ranks, dataset, output, storage)
        data = _source_pictures(source, {p.sample_index for p in stored}, dataset, storage)
        for picture in stored:
            try:
                tiles = _cut_again(picture, data.get(picture.sample_index), tiling, source)
            except (PictureError, PartError) as error:
                agreement.problems.append(f"{picture}: cannot be computed again: {error}")
                continue
            layer = dataset.settings["layer"]
            names = tuple(dataset.features)
            reference = reference_embeddings(model, checkpoint, tiles, names, layer)
            _compare(picture, reference, dataset, agreement)
    return agreement


def _choose(commits: Sequence[Commit], number: int, seed: int) -> list[tuple[Commit, set[int]]]:
    """Which pictures, as ranks among the embedded ones of their shard."""
    embedded = [commit.samples - commit.rejects for commit in commits]
    total = sum(embedded)
    drawn = np.random.default_rng(seed).choice(total, min(number, total), replace=False)
    ends = np.cumsum(embedded)
    chosen: dict[int, set[int]] = {}
    for at in sorted(drawn.tolist()):
        shard = int(np.searchsorted(ends, at, side="right"))
        chosen.setdefault(shard, set()).add(at - int(ends[shard]) + embedded[shard])
    return [(commits[shard], ranks) for shard, ranks in chosen.items()]


def _stored_pictures(
    commit: Commit, ranks: Set[int], dataset: Dataset, output: str, storage: Storage
) -> list[StoredPicture]:
    layout = layout_of(dataset)
    pieces: dict[int, tuple[str, list[pa.Table]]] = {}  # by sample_index
    rank, last = -1, -1
    for part in commit.parts:
        for table in part_tables(part, output, layout, storage):
            index = table["sample_index"].to_numpy()
            ends = [*run_starts(index).tolist(), len(index)]
            for start, end in itertools.pairwise(ends):
                rank += int(index[start]) != last  # a picture may go on in the next batch
                last = int(index[start])
                if rank in ranks:
                    # A copy, that the other rows of the batch need not stay.
                    rows = table.take(pa.array(range(start, end)))
                    pieces.setdefault(last, (part.path, []))[1].append(rows)
    return [
        StoredPicture(path, sample, pa.concat_tables(tables))
        for sample, (path, tables) in pieces.items()
    ]


def _source_pictures(
    source: Shard, wanted: Set[int], dataset: Dataset, storage: Storage
) -> dict[int, bytes]:
    """Encoded pictures by sample_index, as far as the source still has them."""
    found: dict[int, bytes] = {}
    settings = ReadSettings(storage, tuple(dataset.settings["image_key"]), accept_truncated=True)
    for group in read_groups(source, settings):
        for row in group.samples.to_pylist():
            if row["sample_index"] in wanted:
                found[row["sample_index"]] = row["data"]
        if len(found) == len(wanted):
            break
    return found


def _cut_again(
    picture: StoredPicture, data: bytes | None, tiling: Tiling, source: Shard
) -> npt.NDArray[np.uint8]:
    """The picture's tiles uint8 [n, S, S, 3] from its encoded bytes.

    Raises:
        PictureError: it cannot be decoded.
        PartError: the source has it no longer, or it is cut into other tiles than were stored.
    """
    if data is None:
        raise PartError(f"not found in the source {redact(source.url)}")
    if hashlib.sha256(data).digest() != picture.rows["image_sha256"][0].as_py():
        raise PartError(f"the source {redact(source.url)} has another picture there")
    plan = plan_tiles(*picture_size(data), tiling)
    boxes = np.asarray(plan.boxes, np.float32)  # [n, 4]
    if not np.array_equal(boxes, feature_values(picture.rows["tile_box"], 4)):
        raise PartError("the stored tile_box are not those of its tiling")
    side = tiling.tile_size
    tiles = np.empty((plan.tile_count, side, side, 3), dtype=np.uint8)
    cut_tiles(data, tiling, plan, tiles)
    return tiles


def _compare(
    picture: StoredPicture, reference: Features, dataset: Dataset, agreement: Agreement
) -> None:
    agreement.pictures += 1
    agreement.tiles += picture.rows.num_rows
    lowest = COSINE.get(dataset.settings["dtype"])
    limit = RELATIVE_ERROR[dataset.settings["embedding_dtype"]]
    for name, shape in dataset.features.items():
        stored = feature_values(picture.rows[name], num_values(shape))
        wanted = reference[name].reshape(len(stored), -1)
        # Tile by tile: the tokens of a large picture are some hundred MB in float64.
        distances = [_distance(*pair) for pair in zip(stored, wanted, strict=True)]
        error, cosine = np.array(distances).T  # [n] each
        agreement.relative_error = max(agreement.relative_error, float(error.max()))
        agreement.cosine = min(agreement.cosine, float(cosine.min()))
        # Written so that a NaN, as a stored vector of zeros gives, is too far away too.
        near = error <= limit if lowest is None else cosine >= lowest
        if not near.all():
            tile = int(np.argmin(near))
            allowed = f"relative error ≤ {limit:g}" if lowest is None else f"cosine ≥ {lowest:g}"
            agreement.problems.append(
                f"{picture}: {name} of tile {tile} is not what transformers' model gives: "
                f"relative error {error[tile]:.1e}, cosine {cosine[tile]:.6f}, allowed {allowed}"
            )


def _distance(
    stored: npt.NDArray[np.floating[Any]], wanted: npt.NDArray[np.floating[Any]]
) -> tuple[float, float]:
    """Relative error and cosine of the values of one tile."""
    stored, wanted = stored.astype(np.float64), wanted.astype(np.float64)
    norm = np.linalg.norm(wanted)
    with np.errstate(invalid="ignore"):
        cosine = stored @ wanted / (np.linalg.norm(stored) * norm)
    return float(np.linalg.norm(stored - wanted) / norm), float(cosine)
